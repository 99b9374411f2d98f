"""Which kinds of layers a checkpoint has, and what has left them, from its tensors and its manifest alone.

The kind of a plain weight follows from its shape: four or five dimensions are a convolution, three are one as well or,
where the name does not end as that of a weight does, experts in one tensor. Forms of layers are in the manifest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..utils.text import format_bytes
from .layer_forms import FORMS_KEY, LayerForm, LayerForms
from .structure import EDITS_KEY, Edits

TITLES = {"low_rank": "low rank", "sparse_low_rank": "low rank beside a sparse weight"}
"""Words for the names of forms that are not one."""

HEAD = ("layers", "count", "parameters", "zeros", "stored")
"""Of the columns of `LayerGroup.row`."""


class Tensor(Protocol):
    """What is looked at of a tensor in a file."""

    @property
    def name(self) -> str:
        """Its key."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the decoded tensor."""

    @property
    def parameters(self) -> int:
        """Elements of the decoded tensor."""

    @property
    def nonzeros(self) -> int:
        """Elements that are not zero."""

    @property
    def stored_bytes(self) -> int:
        """Its size in the file."""


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """The layers of one kind.

    Args:
        kind: "matrices", "convolutions", "stacked experts", or a form with what it has in common.
        layers: how many.
        entries: of the matrices that the layers multiply by; of the form beside a weight, those that it adds.
        parameters: values that are stored for them, zeros counted.
        nonzeros: of these values.
        stored_bytes: in the files.
    """

    kind: str
    layers: int
    entries: int
    parameters: int
    nonzeros: int
    stored_bytes: int

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """The cells of a table below `HEAD`."""
        count, zeros = f"{self.parameters:,}", 1 - self.nonzeros / max(1, self.parameters)
        held = count if self.parameters == self.entries else f"{count} for {self.entries:,} entries"
        return self.kind, str(self.layers), held, f"{zeros:.2%}", format_bytes(self.stored_bytes)

    def __str__(self) -> str:
        kind, layers, held, zeros, stored = self.row
        return f"{kind}: {layers} layers, {held}, {zeros} zeros, {stored}"


def layer_groups(weights: Sequence[Tensor], tensors: Sequence[Tensor], extra: Mapping[str, Any]) -> list[LayerGroup]:
    """Return the kinds of the weights, and the forms of layers.

    Args:
        weights: those that are matrices, whole or seen as one.
        tensors: all.
        extra: of the manifest.
    """
    kinds: dict[str, list[Tensor]] = {}
    forms = LayerForms.from_dict(extra[FORMS_KEY]).layers if extra.get(FORMS_KEY) else {}
    held: dict[str, list[Tensor]] = {name: [] for name in forms}
    for tensor in tensors:
        owner = _owner(tensor.name, forms)
        if owner is not None:
            held[owner].append(tensor)
    inside = {id(tensor) for own in held.values() for tensor in own}
    for weight in weights:
        if id(weight) not in inside:
            kinds.setdefault(_kind(weight), []).append(weight)
    groups = [_group(kind, own, sum(tensor.parameters for tensor in own)) for kind, own in sorted(kinds.items())]
    by_form: dict[str, list[str]] = {}
    for name, form in forms.items():
        if held[name]:  # not those in another shard
            by_form.setdefault(form.form, []).append(name)
    for title, names in by_form.items():
        own = [tensor for name in names for tensor in held[name]]
        entries = sum(forms[name].facts.get("rows", 0) * forms[name].facts.get("columns", 0) for name in names)
        kind = TITLES.get(title, title) + _common([forms[name] for name in names])
        groups.append(dataclasses.replace(_group(kind, own, entries), layers=len(names)))
    return groups


def removed_groups(extra: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Return how many heads, neurons, experts and filters are left, of how many, in how many places."""
    edits = Edits.from_dict(extra.get(EDITS_KEY) or {})
    found: dict[str, tuple[int, int, int]] = {}
    for kind, _, cut in edits:
        left, before, places = found.get(kind, (0, 0, 0))
        found[kind] = left + cut.count, before + cut.before, places + 1
    return found


def removed_lines(removed: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """Return what is left as text.

    Example:
        >>> removed_lines({"filters": (1056, 2112, 6)})
        ['filters: 1,056 of 2,112 left in 6 layers that have lost some']
    """
    return [
        f"{kind}: {left:,} of {before:,} left in {places} layers that have lost some"
        for kind, (left, before, places) in removed.items()
    ]


def _owner(name: str, forms: Mapping[str, LayerForm]) -> str | None:
    """Return the layer whose form a tensor is a part of: not its bias, nor the sparse weight beside it."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        layer = ".".join(parts[:cut])
        if layer in forms:
            return layer if ".".join(parts[cut:]) not in ("weight", "bias") else None
    return None


def _kind(weight: Tensor) -> str:
    if len(weight.shape) > 3 or (len(weight.shape) == 3 and weight.name.endswith("weight")):
        return "convolutions"
    return "stacked experts" if len(weight.shape) == 3 else "matrices"


def _group(kind: str, tensors: Iterable[Tensor], entries: int) -> LayerGroup:
    own = list(tensors)
    parameters, nonzeros, stored = (
        sum(getattr(tensor, key) for tensor in own) for key in ("parameters", "nonzeros", "stored_bytes")
    )
    return LayerGroup(kind, len(own), entries, parameters, nonzeros, stored)


def _common(forms: Sequence[LayerForm]) -> str:
    """Return the integers of a form beside shape and seed, as text: `, rank 8`, or from the lowest to the highest."""
    text = ""
    for key in forms[0].facts:
        if key not in ("rows", "columns", "seed"):
            values = [form.facts.get(key, 0) for form in forms]
            low, high = f"{min(values):,}", f"{max(values):,}"
            text += f", {key} {low}" if low == high else f", {key} {low} to {high}"
    return text
