from __future__ import annotations

import pytest
import yaml

from hf_sparse.errors import RecipeError
from hf_sparse.utils.strict_yaml import dump_yaml, override, parse_yaml


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{seed: 1, seed: 2}", "key 'seed' is there twice"),
        ("{1: a}", "key 1 is not a word"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("{a: [}", "expected the node content"),
    ],
)
def test_parse_yaml_refuses(text, reason):
    with pytest.raises(yaml.YAMLError, match=reason):
        parse_yaml(text)


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
        ("seed", "an override is key.path=value"),
        ("=1", "an override is key.path=value"),
        ("a..b=1", "an override is key.path=value"),
        ("seed=[1", "is not YAML"),
        ("seed.x=1", "seed is 0, so there is nothing called 'x'"),
        ("groups.2.x=1", "groups is a list of 2, counted from 0, and has no item '2'"),
        ("groups.-1.x=1", "groups is a list of 2, counted from 0, and has no item '-1'"),
        ("new.0.x=1", "new has no item 0"),
    ],
)
def test_override_refuses_a_path_that_leads_nowhere(assignment, reason):
    with pytest.raises(RecipeError, match=reason):
        override({"seed": 0, "groups": [{}, {}]}, assignment)
