"""The text of a recipe: YAML read as people mean it, and `key.path=value` overrides of what it says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `no` and `2:4` are words, and no key may be there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_KINDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|false|False", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
"""What is not quoted and yet no text: the kind, and how its first character can look. All else is left out, such as
times of day, which would make 124 of 2:4, and dates."""

_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this or any other reader of YAML would take for something else."""


for _kind, (_regex, _first) in _KINDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_regex})$"), _first)


def dump_yaml(data: Any) -> str:
    """Return plain types as YAML that `parse_yaml`, and any other reader, takes for the same.

    Example:
        >>> print(dump_yaml({"revision": "1e4", "text": "sentence"}), end="")
        revision: '1e4'
        text: sentence
    """
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says, in plain types only.

    Raises:
        yaml.YAMLError: for text that is no YAML, or has a key twice.

    Example:
        >>> parse_yaml("{learning_rate: 1e-4, pattern: 2:4, save_strategy: no}")
        {'learning_rate': 0.0001, 'pattern': '2:4', 'save_strategy': 'no'}
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader: plain types only


def override(data: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """Return `data` with one value replaced; keys lead into mappings, whole numbers into lists.

    A name stands for a mapping with that name, so an option can be added to it.

    Args:
        assignment: `key.path=value`, the value in YAML.

    Raises:
        RecipeError: without "=", for a value that is no YAML, or a path that leads nowhere.

    Example:
        >>> override({"sparsity": {"sparsity": 0.9, "scorer": "movement"}}, "sparsity.scorer.learning_rate=1e-3")
        {'sparsity': {'sparsity': 0.9, 'scorer': {'name': 'movement', 'learning_rate': 0.001}}}
        >>> override({"sparsity": {"groups": [{"sparsity": 0.9}]}}, "sparsity.groups.0.sparsity=0.97")
        {'sparsity': {'groups': [{'sparsity': 0.97}]}}
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path or "" in path.split("."):
        raise RecipeError(f"an override is key.path=value, as in training.max_steps=100, not {assignment!r}")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of override {assignment!r} is not YAML: {error}") from error
    return _replaced(data, path.split("."), value, "the recipe")


def _replaced(node: Any, keys: Sequence[str], value: Any, where: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    below = key if where == "the recipe" else f"{where}.{key}"
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise RecipeError(f"{where} is a list of {len(node)}, counted from 0, and has no item '{key}'")
        return [_replaced(item, rest, value, below) if i == int(key) else item for i, item in enumerate(node)]
    if isinstance(node, str):
        node = {"name": node}
    if node is not None and not isinstance(node, Mapping):
        raise RecipeError(f"{where} is {node!r}, so there is nothing called '{key}' in it")
    node = dict(node or {})
    if key.isdecimal() and not node:
        raise RecipeError(f"{where} has no item {key}; an override can change items of a list, but not begin one")
    return {**node, key: _replaced(node.get(key), rest, value, below)}
