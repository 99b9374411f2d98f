"""Strict YAML: the only reader of YAML in hf_sparse, its writer, and `key.path=value` overrides.

Recipes come from others, so reading takes bounded time and memory: aliases, anchors and tags are refused, and depth,
digits and size are bounded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import RecipeError
from .atomic_io import require_regular
from .text import shorten

MAX_DEPTH = 50
MAX_DIGITS = 100
MAX_BYTES = 1 << 20


def _refuse(problem: str, mark: yaml.Mark | None) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `no` and `2:4` are text, and no key may be there twice."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            # A few hundred bytes of aliases can stand for more text than there is memory ("billion laughs").
            _refuse("anchors (&) and aliases (*) are not supported: write the value out, or quote it", event.start_mark)
        if event.tag is not None:
            _refuse(f"tags are not supported: remove {event.tag}, or quote the value", event.start_mark)
        if self.depth == MAX_DEPTH:
            _refuse(f"it is nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(f"key {shorten(key)} is not a string: quote it", key_node.start_mark)
            if key in seen:
                _refuse(f"key {shorten(key)} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            _refuse(f"the integer has more than {MAX_DIGITS} digits", node.start_mark)
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = float(super().construct_yaml_float(node))
        if math.isinf(value) and "inf" not in node.value:
            _refuse(f"the number {shorten(node.value)} is too large", node.start_mark)
        return value


_KINDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|false|False", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
"""What is not quoted and yet no string: the kind, and its possible first characters. All else is left out, such as
times of day, which would make 124 of 2:4, and dates."""

_Loader.yaml_implicit_resolvers = {}
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this or any other reader of YAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # one object in two places is written twice: `parse_yaml` refuses aliases


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
    """Return the content of YAML text, in plain types only.

    Raises:
        RecipeError: for text that is not YAML, has a key twice, or has an anchor, alias or tag; naming line and column.

    Example:
        >>> parse_yaml("{learning_rate: 1e-4, pattern: 2:4, save_strategy: no}")
        {'learning_rate': 0.0001, 'pattern': '2:4', 'save_strategy': 'no'}
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader: plain types only
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the content of a YAML file, see `parse_yaml`.

    Raises:
        RecipeError: if the file cannot be read, is not a regular file, is larger than 1 MiB, or as `parse_yaml`.
    """
    try:
        require_regular(path)
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise RecipeError(f"it has {size} bytes, and at most {MAX_BYTES} are read")
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecipeError) as error:
        raise RecipeError(f"cannot read recipe {os.fspath(path)}: {error}") from None


def override(data: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """Return `data` with one value replaced; keys lead into mappings, integers into lists.

    A name stands for a mapping with that name, so an option can be added to it.

    Args:
        assignment: `key.path=value`, the value in YAML.

    Raises:
        RecipeError: without "=", for a value that is not valid YAML, or a path that leads nowhere.

    Example:
        >>> override({"sparsity": {"sparsity": 0.9, "scorer": "movement"}}, "sparsity.scorer.learning_rate=1e-3")
        {'sparsity': {'sparsity': 0.9, 'scorer': {'name': 'movement', 'learning_rate': 0.001}}}
        >>> override({"sparsity": {"groups": [{"sparsity": 0.9}]}}, "sparsity.groups.0.sparsity=0.97")
        {'sparsity': {'groups': [{'sparsity': 0.97}]}}
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path or "" in path.split("."):
        raise RecipeError(
            f"an override must be key.path=value, as in training.max_steps=100, got {shorten(assignment)}"
        )
    try:
        value = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"the value of override {shorten(assignment)} is {error}") from None
    keys = path.split(".")
    if len(keys) > MAX_DEPTH:
        raise RecipeError(f"override {shorten(assignment)} leads deeper than {MAX_DEPTH} levels")
    return _replaced(data, keys, value, "the recipe")


def _replaced(node: Any, keys: Sequence[str], value: Any, where: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    below = key if where == "the recipe" else f"{where}.{key}"
    if isinstance(node, list):
        if key not in map(str, range(len(node))):
            raise RecipeError(f"{where} is a list of {len(node)}, counted from 0, and has no item {shorten(key)}")
        return [_replaced(item, rest, value, below) if str(i) == key else item for i, item in enumerate(node)]
    if isinstance(node, str):
        node = {"name": node}
    if node is not None and not isinstance(node, Mapping):
        raise RecipeError(f"{where} is {shorten(node)}, so there is nothing called '{key}' in it")
    node = dict(node or {})
    if key.isdecimal() and not node:
        raise RecipeError(f"{where} has no item {key}; an override can change items of a list, but not begin one")
    return {**node, key: _replaced(node.get(key), rest, value, below)}
