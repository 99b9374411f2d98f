from __future__ import annotations

import os
import re
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from hf_sparse.errors import RecipeError
from hf_sparse.utils import strict_yaml
from hf_sparse.utils.strict_yaml import MAX_BYTES, dump_yaml, override, parse_yaml, read_yaml
from tests.helpers.limits import limited


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        ("1.5e+2", 150.0),
        ("0.9", 0.9),
        ("1400", 1400),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("2:4", "2:4"),
        ("12:30:45", "12:30:45"),
        ("2026-01-02", "2026-01-02"),
        (".5", 0.5),
        ("-0", 0),
        ("010", "010"),
        ("1e4x", "1e4x"),
        ("<<", "<<"),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("[a, b]", ["a", "b"]),
        ("{name: block, rows: 32}", {"name": "block", "rows": 32}),
    ],
)
def test_parse_yaml_reads_what_people_mean(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{seed: 1, seed: 2}", "key 'seed' is there twice"),
        ("{1: a}", "key 1 is not a string"),
        ("{? [a] : b}", r"key \['a'\] is not a string"),
        ("!!python/object/apply:os.getcwd []", "tags are not supported"),
        ("seed: !!int foo", "tags are not supported: remove tag:yaml.org,2002:int.*"),
        ("day: !!timestamp 2024-99-99", "tags are not supported"),
        ("{a: [}", "expected the node content"),
        ("a: \x1b[2J", "special characters are not allowed"),
        (LAUGHS, r"anchors \(&\) and aliases \(\*\) are not supported"),
        ("a: *b", "aliases"),
        ("a: &a {<<: *a}", "anchors"),
        ("&a k: 1", "anchors"),
        ("[" * 900, "nested deeper than 50 levels"),
        ("[" * 900 + "]" * 900, "nested deeper than 50 levels"),
        ("- " * 900, "nested deeper than 50 levels"),
        ("{a: " * 900, "nested deeper than 50 levels"),
        ("? " * 900, "nested deeper than 50 levels"),
        ("9" * 5000, "more than 100 digits"),
        ("-" + "9" * 5000, "more than 100 digits"),
        ("1e999", "the number '1e999' is too large"),
        ("9" * 5000 + ".5", "too large"),
        ("a\n---\nb", "single document"),
    ],
    ids=lambda text: text[:20],
)
def test_parse_yaml_refuses(text, reason):
    with pytest.raises(RecipeError, match=f"(?s)^not valid YAML: .*{reason}") as refused:
        limited(parse_yaml, text, seconds=5, megabytes=100)
    assert len(str(refused.value)) < 400


def test_parse_yaml_reads_what_is_just_not_too_deep_or_long():
    assert repr(parse_yaml("[" * 50 + "]" * 50)) == "[" * 50 + "]" * 50
    assert parse_yaml("9" * 100) == int("9" * 100)
    assert parse_yaml("-.inf") == float("-inf")
    assert parse_yaml("2024-99-99") == "2024-99-99"


@hypothesis.given(st.text(alphabet="abn012.e-+:,[]{}&*!?|>'\"#%@~\n\t x", max_size=60))
def test_parse_yaml_returns_plain_types_or_an_error_of_ours(text):
    try:
        found = parse_yaml(text)
    except RecipeError:
        return
    assert parse_yaml(dump_yaml(found)) == found or "nan" in dump_yaml(found)


def test_read_yaml_names_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1")
    assert read_yaml(path) == {"seed": 1}
    path.write_text("seed: [")
    with pytest.raises(RecipeError, match=r"cannot read recipe .*recipe.yaml: not valid YAML"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match=r"cannot read recipe .*recipe.yaml: .*utf-8"):
        read_yaml(path)
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="1048577 bytes"):
        read_yaml(path)
    with pytest.raises(RecipeError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="not a regular file"):
        read_yaml(tmp_path)


def test_read_yaml_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="not a regular file"):
        limited(read_yaml, tmp_path / "recipe.yaml", seconds=5)


def test_dump_yaml_writes_one_object_in_two_places_without_an_alias():
    group = {"sparsity": 0.9}
    assert parse_yaml(dump_yaml({"a": group, "b": [group, group]})) == {"a": group, "b": [group, group]}


@pytest.mark.parametrize("load", [parse_yaml, yaml.safe_load])
def test_dump_yaml_is_read_back_by_everyone(load):
    data = {
        "a": [
            1,
            -2,
            0.5,
            1e-7,
            1e22,
            float("inf"),
            True,
            False,
            None,
            "no",
            "2:4",
            "1e-4",
            "1.0",
            "010",
            "2026-01-02",
            "null",
            "true",
            "",
        ]
    }
    assert load(dump_yaml(data)) == data


def test_parse_yaml_leaves_the_loader_of_others_alone():
    assert yaml.safe_load("no") is False


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("seed=3", {"seed": 3}),
        ("sparsity=null", {"sparsity": None}),
        ("sparsity.groups.1.sparsity=0.97", {"sparsity": {"groups": [{"sparsity": 0.9}, {"sparsity": 0.97}]}}),
        ("training.learning_rate=1e-4", {"training": {"learning_rate": 1e-4}}),
        ("model.revision=v2", {"model": {"name": "bert", "revision": "v2"}}),
        ("data.train=a=b.json", {"data": {"train": "a=b.json"}}),
    ],
)
def test_override_changes_one_value(assignment, changed):
    data = {
        "model": "bert",
        "data": {"train": "t.json"},
        "sparsity": {"groups": [{"sparsity": 0.9}, {"sparsity": 0.5}]},
        "training": None,
        "seed": 0,
    }
    before = repr(data)
    assert override(data, assignment) == {**data, **changed}
    assert repr(data) == before


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("seed", "an override must be key.path=value"),
        ("=1", "an override must be key.path=value"),
        ("a..b=1", "an override must be key.path=value"),
        ("seed=[1", "is not valid YAML"),
        ("seed=*a", "is not valid YAML: anchors"),
        ("a." * 1000 + "a=1", "deeper than 50 levels"),
        ("groups." + "9" * 5000 + "=1", "has no item '999"),
        ("seed.x=1", "seed is 0, so there is nothing called 'x'"),
        ("groups.2.x=1", "groups is a list of 2, counted from 0, and has no item '2'"),
        ("groups.-1.x=1", "groups is a list of 2, counted from 0, and has no item '-1'"),
        ("new.0.x=1", "new has no item 0"),
    ],
)
def test_override_refuses_a_path_that_leads_nowhere(assignment, reason):
    with pytest.raises(RecipeError, match=reason):
        override({"seed": 0, "groups": [{}, {}]}, assignment)


def test_no_other_module_reads_or_writes_yaml():
    package = Path(strict_yaml.__file__).parents[1]
    importers = [path for path in package.rglob("*.py") if re.search(r"^\s*(import|from) yaml", path.read_text(), re.M)]
    assert importers == [Path(strict_yaml.__file__)]
