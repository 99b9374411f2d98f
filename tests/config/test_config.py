from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import GroupConfig, RecipeError, SparsityConfig

# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1, 90, math.inf, math.nan])
def test_config_refuses_a_sparsity_outside_its_range(sparsity: float) -> None:
    with pytest.raises(RecipeError, match=rf"`sparsity` must be (a number )?in \[0, 1\), got {sparsity}"):
        SparsityConfig(sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [True, False, "0.9", [0.9], {"value": 0.9}])
def test_config_refuses_a_sparsity_that_is_no_number(sparsity: Any) -> None:
    with pytest.raises(RecipeError, match=r"`sparsity` must be a number in \[0, 1\), got "):
        SparsityConfig(sparsity=sparsity)


def test_config_refuses_to_guess_a_sparsity() -> None:
    with pytest.raises(RecipeError, match=r"`sparsity` is missing.*sparsity=0\.9"):
        SparsityConfig(scorer="magnitude")


@pytest.mark.parametrize(
    ("key", "given_name", "meant"),
    [
        ("scorer", "movment", "movement"),
        ("pattern", "elment", "element"),
        ("selection", "gobal", "global"),
        ("schedule", "cubik", "cubic"),
    ],
)
def test_config_names_the_nearest_for_an_unknown_name(key: str, given_name: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown {key} '{given_name}'; did you mean '{meant}'\? Known: "):
        SparsityConfig.from_dict({"sparsity": 0.5, key: given_name})


def test_config_names_the_nearest_for_an_unknown_key() -> None:
    with pytest.raises(RecipeError, match=r"no key 'scoer'; did you mean 'scorer'\? Known keys: targets, exclude"):
        SparsityConfig(sparsity=0.5, scoer="movement")


def test_config_names_the_nearest_for_an_unknown_option() -> None:
    with pytest.raises(RecipeError, match=r"scorer 'movement' has no key 'lerning_rate'; did you mean 'learning_rate'"):
        SparsityConfig(sparsity=0.5, scorer={"name": "movement", "lerning_rate": 1e-2})


@pytest.mark.parametrize(
    "data", [{"group": [{"sparsity": 0.5}]}, {"groups": [{"sparsity": 0.5, "targts": "*"}]}, {"sparsity": 0.5, 3: 4}]
)
def test_config_refuses_unknown_keys_of_a_mapping(data: Any) -> None:
    with pytest.raises(RecipeError, match=r"has no key '(group|targts|3)'"):
        SparsityConfig.from_dict(data)


def test_config_thinks_of_groups_when_a_section_says_group() -> None:
    with pytest.raises(RecipeError, match="did you mean 'groups'"):
        SparsityConfig.from_dict({"group": [{"sparsity": 0.5}]})


@pytest.mark.parametrize("key", ["scorer", "pattern", "schedule", "selection"])
@pytest.mark.parametrize("spec", [5, 2.5, ["element"], {"rows": 2}, True])
def test_config_refuses_specs_that_are_neither_name_nor_mapping(key: str, spec: Any) -> None:
    with pytest.raises(RecipeError, match=f"a {key} must be a name or "):
        SparsityConfig(sparsity=0.5, **{key: spec})


@pytest.mark.parametrize("key", ["scorer", "pattern", "schedule"])
def test_config_refuses_none_where_a_part_is_needed(key: str) -> None:
    with pytest.raises(RecipeError, match=f"a {key} must be a name or "):
        SparsityConfig(sparsity=0.5, **{key: None})


@pytest.mark.parametrize("key", ["targets", "exclude"])
@pytest.mark.parametrize("globs", [5, "", [""], ["a", 5], {"a": "b"}, [["a"]], True])
def test_config_refuses_globs_of_the_wrong_type(key: str, globs: Any) -> None:
    with pytest.raises(RecipeError, match=f"`{key}` must be a shell glob or a list of them, got "):
        SparsityConfig(sparsity=0.5, **{key: globs})


def test_config_refuses_an_empty_list_of_targets() -> None:
    with pytest.raises(RecipeError, match=r"`targets` must have at least one glob, got \[\]"):
        SparsityConfig(sparsity=0.5, targets=[])


@pytest.mark.parametrize("groups", [[], "element", {"sparsity": 0.5}, 5, 0])
def test_config_refuses_groups_that_are_no_list_of_groups(groups: Any) -> None:
    with pytest.raises(RecipeError, match="`groups` must be a list with at least one group, got "):
        SparsityConfig(groups=groups)


def test_config_refuses_a_group_that_is_no_mapping() -> None:
    with pytest.raises(RecipeError, match=r"a group must be a mapping with keys .*, got 'element'"):
        SparsityConfig(groups=["element"])  # type: ignore[list-item]


def test_config_refuses_keys_of_one_group_beside_groups() -> None:
    with pytest.raises(RecipeError, match="either groups or the keys of one group, not both: scorer, sparsity"):
        SparsityConfig(groups=[{"sparsity": 0.5}], sparsity=0.5, scorer="movement")


@pytest.mark.parametrize("data", [None, [], "0.9", 0.9])
def test_config_refuses_a_section_that_is_no_mapping(data: Any) -> None:
    with pytest.raises(RecipeError, match="a sparsity section must be a mapping, got "):
        SparsityConfig.from_dict(data)


def test_config_refuses_a_sparsity_that_the_pattern_contradicts() -> None:
    with pytest.raises(RecipeError, match=r"`sparsity` must be 0\.5 or left out with pattern '2:4', got 0\.9"):
        SparsityConfig(sparsity=0.9, pattern="2:4")


def test_config_refuses_a_sparsity_beside_a_threshold_with_a_value() -> None:
    with pytest.raises(RecipeError, match=r"`sparsity` must be left out with selection .*, got 0\.5"):
        SparsityConfig(sparsity=0.5, selection={"name": "threshold", "value": 0.1})


def test_config_refuses_a_schedule_that_would_fall() -> None:
    with pytest.raises(RecipeError, match=r"`initial` .* must not be above the final sparsity of 0\.5, got 0\.6"):
        SparsityConfig(sparsity=0.5, schedule={"name": "linear", "initial": 0.6})


def test_config_refuses_a_schedule_longer_than_the_run() -> None:
    with pytest.raises(RecipeError, match=r"schedule 'cubic': `end` must be in \[0, 1\], got 1\.2"):
        SparsityConfig(sparsity=0.5, schedule={"name": "cubic", "begin": 0.2, "end": 1.2})


# -- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, 0.999999, np.float64(0.5)])
def test_config_keeps_a_sparsity_as_a_plain_float(sparsity: float) -> None:
    kept = SparsityConfig(sparsity=sparsity).groups[0].sparsity
    assert type(kept) is float
    assert kept == sparsity


def test_config_needs_no_sparsity_when_the_pattern_decides_it() -> None:
    assert SparsityConfig(pattern="2:4").groups[0].sparsity is None
    assert SparsityConfig(pattern="2:4", sparsity=0.5) != SparsityConfig(pattern="2:4", sparsity=None)


def test_config_needs_no_sparsity_when_the_threshold_decides_it() -> None:
    assert SparsityConfig(selection={"name": "threshold", "value": 0.1}).groups[0].sparsity is None


def test_config_has_the_documented_defaults() -> None:
    (group,) = SparsityConfig(sparsity=0.5).groups
    assert (group.targets, group.exclude, group.selection) == (None, (), None)
    assert (group.scorer, group.pattern, group.schedule) == ("magnitude", "element", "cubic")


def test_config_takes_one_glob_for_a_list_of_one() -> None:
    assert SparsityConfig(sparsity=0.5, targets="a*", exclude="*b").groups[0].targets == ("a*",)
    assert SparsityConfig(sparsity=0.5, targets="a*") == SparsityConfig(sparsity=0.5, targets=["a*"])


def test_config_takes_groups_as_mappings_and_as_objects() -> None:
    group = {"targets": ["*.attention.*"], "sparsity": 0.7}
    assert SparsityConfig(groups=[group]) == SparsityConfig(groups=[GroupConfig(**group)])  # type: ignore[arg-type]


def test_config_of_one_group_is_the_config_of_a_list_of_it() -> None:
    assert SparsityConfig(sparsity=0.7, scorer="movement") == SparsityConfig(
        groups=[{"sparsity": 0.7, "scorer": "movement"}]
    )


def test_config_differs_when_any_part_differs() -> None:
    config = SparsityConfig(sparsity=0.7)
    assert config != SparsityConfig(sparsity=0.8)
    assert config != SparsityConfig(groups=[{"sparsity": 0.7}, {"sparsity": 0.7, "targets": "a"}])
    assert config != "a config"


def test_config_does_not_change_with_the_mapping_it_was_made_from() -> None:
    scorer = {"name": "movement", "learning_rate": 0.1}
    config = SparsityConfig(sparsity=0.7, scorer=scorer)
    scorer["learning_rate"] = 0.2
    assert config.to_dict() == {"groups": [{"scorer": {"name": "movement", "learning_rate": 0.1}, "sparsity": 0.7}]}


def test_config_does_not_change_with_the_dict_it_gave_away() -> None:
    config = SparsityConfig(sparsity=0.7, scorer={"name": "movement", "learning_rate": 0.1})
    config.to_dict()["groups"][0]["scorer"]["learning_rate"] = 0.2
    assert config.groups[0].scorer == {"name": "movement", "learning_rate": 0.1}


def test_config_writes_only_what_is_not_default() -> None:
    assert SparsityConfig(sparsity=0.5, scorer="magnitude", exclude=[]).to_dict() == {"groups": [{"sparsity": 0.5}]}


def test_config_shows_its_groups() -> None:
    assert repr(SparsityConfig(sparsity=0.5)) == "SparsityConfig(groups=[{'sparsity': 0.5}])"


# -- there and back ----------------------------------------------------------------------------------------------------

_fractions = st.floats(0.0, 1.0)
_words = st.text("abc.*?[]-_0 é:#'\"\n\t", min_size=1, max_size=12)
_globs = st.one_of(_words, st.lists(_words, min_size=1, max_size=3))


@st.composite
def _named(draw: st.DrawFn, /, name: str, **options: st.SearchStrategy[Any]) -> Any:
    chosen = draw(st.fixed_dictionaries({}, optional=options))
    return {"name": name, **chosen} if chosen else draw(st.sampled_from([name, {"name": name}]))


_rates = st.floats(1e-8, 1e3)
_scorers = st.one_of(
    _named("magnitude"),
    _named("movement", learning_rate=_rates),
    _named("soft_movement", learning_rate=_rates, threshold=st.floats(0.01, 0.99), penalty_strength=st.none() | _rates),
    _named("gradient", momentum=_fractions),
    _named("taylor", momentum=_fractions),
    _named("random", seed=st.integers(0, 2**63 - 1)),
)
_free_patterns = st.one_of(
    _named("element"),
    _named("row"),
    _named("column"),
    _named("block", rows=st.integers(1, 512), cols=st.integers(1, 512)),
)


@st.composite
def _nm(draw: st.DrawFn) -> Any:
    m = draw(st.integers(2, 32))
    n = draw(st.integers(1, m - 1))
    return draw(st.sampled_from([f"{n}:{m}", {"name": "n:m", "n": n, "m": m}, {"name": f"{n}:{m}"}]))


@st.composite
def _schedules(draw: st.DrawFn) -> Any:
    begin, end = sorted((draw(_fractions), draw(_fractions)))
    ends = {"begin": st.just(begin), "end": st.just(end), "every": st.integers(1, 1000)}
    name = draw(st.sampled_from(["linear", "cubic", "stepwise", "constant"]))
    if name == "constant":
        return draw(_named("constant", begin=st.just(begin), every=st.integers(1, 1000)))
    if name == "stepwise":
        ends["steps"] = st.integers(1, 50)
    spec = draw(_named(name, **ends))
    # begin alone may lie behind the default end, and end before the default begin.
    return {**spec, "begin": begin, "end": end} if isinstance(spec, dict) and {"begin", "end"} & set(spec) else spec


@st.composite
def _groups(draw: st.DrawFn) -> dict[str, Any]:
    optional = {"targets": _globs, "exclude": st.just([]) | _globs, "scorer": _scorers, "schedule": _schedules()}
    group = draw(st.fixed_dictionaries({}, optional=optional))
    kind = draw(st.sampled_from(["free", "n:m", "threshold"]))
    if kind == "n:m":
        return group | {"pattern": draw(_nm())}
    pattern = draw(_free_patterns)
    if kind == "threshold":
        return group | {"pattern": pattern, "selection": {"name": "threshold", "value": draw(st.floats(-10, 10))}}
    selection = draw(st.sampled_from([None, "uniform", "global", "threshold", {"name": "global"}]))
    return group | {"pattern": pattern, "selection": selection, "sparsity": draw(st.floats(0.0, 1.0, exclude_max=True))}


_configs = st.lists(_groups(), min_size=1, max_size=3).map(lambda groups: SparsityConfig(groups=groups))


@given(_configs)
def test_config_comes_back_from_its_dict(config: SparsityConfig) -> None:
    assert SparsityConfig.from_dict(config.to_dict()) == config


@given(_configs)
def test_config_comes_back_from_json(config: SparsityConfig) -> None:
    data = config.to_dict()
    assert json.loads(json.dumps(data)) == data  # plain JSON types, so no tuples
    assert SparsityConfig.from_dict(json.loads(json.dumps(data))) == config


@given(config=_configs)
def test_config_comes_back_from_a_recipe(tmp_path_factory: pytest.TempPathFactory, config: SparsityConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "there_and_back.yaml"
    config.to_recipe(path)
    assert SparsityConfig.from_recipe(path) == config


def test_config_reads_the_sparsity_section_of_a_recipe_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: somewhere}\nsparsity:\n  sparsity: 0.9\n  scorer: movement\n", encoding="utf-8")
    assert SparsityConfig.from_recipe(path) == SparsityConfig(sparsity=0.9, scorer="movement")


def test_config_writes_a_recipe_that_people_can_read(tmp_path: Path) -> None:
    SparsityConfig(sparsity=0.9, scorer={"name": "movement", "learning_rate": 0.01}).to_recipe(tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text(encoding="utf-8") == (
        "sparsity:\n  groups:\n  - scorer:\n      name: movement\n      learning_rate: 0.01\n    sparsity: 0.9\n"
    )


@pytest.mark.parametrize("text", ["", "sparsity: 0.9", "- sparsity", "sparsity:", "model: {name: somewhere}"])
def test_config_refuses_a_recipe_without_a_sparsity_section(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe .*recipe\.yaml has no 'sparsity' section"):
        SparsityConfig.from_recipe(path)


@pytest.mark.parametrize("content", [b"sparsity: [", b"sparsity: \xff", b"a: b: c"])
def test_config_refuses_a_recipe_that_is_no_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"cannot read recipe .*recipe\.yaml: "):
        SparsityConfig.from_recipe(path)


def test_config_and_recipe_read_unquoted_words_alike(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsity: {pattern: 2:4, scorer: {name: movement, learning_rate: 1e-2}}\n", encoding="utf-8")
    config = SparsityConfig.from_recipe(path)
    assert config == SparsityConfig(pattern="2:4", scorer={"name": "movement", "learning_rate": 0.01})
    config.to_recipe(tmp_path / "written.yaml")
    assert SparsityConfig.from_recipe(tmp_path / "written.yaml") == config


def test_config_refuses_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read recipe"):
        SparsityConfig.from_recipe(tmp_path / "nowhere.yaml")


def test_config_runs_nothing_that_a_recipe_says(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"sparsity: !!python/object/apply:os.mkdir ['{made}']\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        SparsityConfig.from_recipe(path)
    assert not made.exists()
