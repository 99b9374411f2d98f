from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hf_sparse.errors import RecipeError
from hf_sparse.registry import Registry, check_keys, nearest


@dataclasses.dataclass
class Round:
    size: int = 1
    made: int = dataclasses.field(default=0, init=False)


@dataclasses.dataclass
class Square:
    edge: float

    def __post_init__(self) -> None:
        if self.edge < 0:
            raise RecipeError(f"edge={self.edge} is negative")


@pytest.fixture
def shapes() -> Registry[Any]:
    registry: Registry[Any] = Registry("shape")
    registry.register("square")(Square)
    registry.register("round")(Round)
    registry.shorthand(r"r(\d+)", lambda match: {"name": "round", "size": int(match[1])})
    return registry


def test_registry_builds_a_name_with_its_defaults(shapes: Registry[Any]) -> None:
    assert shapes.build("round") == Round(1)


def test_registry_builds_a_mapping_with_its_options(shapes: Registry[Any]) -> None:
    assert shapes.build({"name": "square", "edge": 2.0}) == Square(2.0)


def test_registry_sets_the_name_on_the_class(shapes: Registry[Any]) -> None:
    assert shapes["round"].name == "round"


def test_registry_lists_its_names_in_order(shapes: Registry[Any]) -> None:
    assert list(shapes) == ["round", "square"]
    assert "round" in shapes
    assert "oval" not in shapes
    assert 7 not in shapes


def test_registry_refuses_a_name_that_is_taken(shapes: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="shape 'round' is registered twice"):
        shapes.register("round")(Square)
    assert shapes["round"] is Round


@pytest.mark.parametrize("spec", ["r12", {"name": "r12"}])
def test_registry_expands_a_shorthand(shapes: Registry[Any], spec: Any) -> None:
    assert shapes.build(spec) == Round(12)


def test_options_beside_a_shorthand_replace_its_own(shapes: Registry[Any]) -> None:
    assert shapes.build({"name": "r3", "size": 5}) == shapes.build({"name": "round", "size": 5})
    with pytest.raises(RecipeError, match="height"):
        shapes.build({"name": "r3", "height": 5})


@pytest.mark.parametrize("name", ["r12x", "xr12", "r"])
def test_registry_expands_a_shorthand_only_when_all_of_the_name_matches(shapes: Registry[Any], name: str) -> None:
    with pytest.raises(RecipeError, match="unknown shape"):
        shapes.build(name)


def test_registry_names_the_nearest_and_all_known_for_an_unknown_name(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        shapes.build("sqare")
    assert str(caught.value) == "unknown shape 'sqare'; did you mean 'square'? Known: round, square."


def test_registry_ends_the_sentence_when_nothing_is_near(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        shapes.build("zzz")
    assert str(caught.value) == "unknown shape 'zzz'. Known: round, square."


def test_registry_names_the_nearest_option_for_an_unknown_one(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        shapes.build({"name": "round", "siz": 3})
    assert str(caught.value) == "shape 'round' has no key 'siz'; did you mean 'size'? Known keys: size."


def test_registry_refuses_fields_that_are_no_options(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError, match="has no key 'made'"):
        shapes.build({"name": "round", "made": 3})


@pytest.mark.parametrize("spec", [None, 3, ["round"], {}, {"size": 3}, {"name": 3}, {"name": None, "size": 3}])
def test_registry_refuses_what_is_neither_name_nor_mapping(shapes: Registry[Any], spec: Any) -> None:
    with pytest.raises(RecipeError, match="a shape must be a name or"):
        shapes.build(spec)


def test_registry_refuses_keys_that_are_no_words(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError, match="shape 'round' has no key '3'"):
        shapes.build({"name": "round", 3: 4})  # type: ignore[dict-item]


def test_registry_turns_a_missing_option_into_its_own_error(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError, match=r"shape 'square': .*'edge'"):
        shapes.build("square")


def test_registry_turns_an_option_of_the_wrong_type_into_its_own_error(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError, match="shape 'square': "):
        shapes.build({"name": "square", "edge": "long"})


def test_registry_hands_on_what_an_entry_refuses(shapes: Registry[Any]) -> None:
    with pytest.raises(RecipeError, match="edge=-1 is negative"):
        shapes.build({"name": "square", "edge": -1})


def test_check_keys_takes_known_keys_in_any_order() -> None:
    known = ["a", "b", "c"]
    check_keys(["b", "a"], known, "a thing")
    with pytest.raises(RecipeError, match="a thing has no key 'd'"):
        check_keys(["b", "a", "d"], known, "a thing")
    assert known == ["a", "b", "c"]


def test_check_keys_names_the_first_unknown_one() -> None:
    with pytest.raises(RecipeError, match="a thing has no key 'x'"):
        check_keys(["a", "x", "y"], ["a"], "a thing")


def test_nearest_asks_only_about_words_that_are_near() -> None:
    assert nearest("movment", ["magnitude", "movement"]) == "; did you mean 'movement'?"
    assert nearest("qqq", ["magnitude", "movement"]) == "."
