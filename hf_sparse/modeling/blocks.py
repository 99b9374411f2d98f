"""Transformer blocks: where they are in a model, and which of their weights are not in linear layers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn

from ..utils.text import kind_of_name
from .forms.low_rank import LowRankPart
from .layer_kinds import is_linear, slots_of
from .ownership import count_owners

_HEAD = re.compile(r"(^|_)heads?$")


@dataclasses.dataclass(frozen=True)
class _List:
    """An `nn.ModuleList` of a model.

    Attributes:
        role: of the part of the model it is in: "base" (the base model of a `PreTrainedModel`), "head" (what such a
            model adds around its base model) or "plain" (anything else).
    """

    name: str
    module: nn.ModuleList
    role: str

    @property
    def is_composite(self) -> bool:
        """Whether its items are more than single linear layers or norms."""
        has_matrices = any(parameter.ndim > 1 for parameter in self.module.parameters())
        return has_matrices and not all(is_linear(item) for item in self.module)

    def has(self, *words: str) -> bool:
        """Return whether any module in it is of a class with one of these words in its name."""
        return has_part(self.module, *words)


def block_prefixes(model: nn.Module) -> list[str]:
    """Return the names of the lists of transformer blocks, each with a dot at its end.

    A list counts if its items have attention or normalization in them, and it is not part of a task head: a model of
    transformers has its heads around its `base_model`, and other heads have the word in their name. Lists of single
    linear layers are heads or projections. XLM keeps attention and feed-forward part in two lists side by side; both
    count.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
        >>> block_prefixes(BertForMaskedLM(BertConfig(vocab_size=10, **sizes)))
        ['bert.encoder.layer.']
    """
    lists = [found for found in _lists(model, "", _role_at_root(model), None) if found.is_composite]
    lists = [found for found in lists if not any(_HEAD.search(part) for part in found.name.split("."))]
    inside = [found for found in lists if found.role == "base"]
    chosen = [found for found in inside if found.has("Attention", "Attn", "Norm")]
    # Around the models of transformers in it, a module has its heads; blocks there have both.
    plain = [found for found in lists if found.role == "plain"]
    attending = [found for found in plain if found.has("Attention", "Attn") and found.has("Norm")]
    if attending or chosen:
        chosen += attending
    else:
        chosen = [found for found in plain if found.has("Attention", "Attn", "Norm")] or inside or plain
    return [f"{name}." for name in dict.fromkeys(found.name for found in (*chosen, *_beside(chosen, inside)))]


def has_part(module: nn.Module, *words: str) -> bool:
    """Return whether any module in this one is of a class with one of these words in its name."""
    return any(word in type(part).__name__ for part in module.modules() for word in words)


def _beside(chosen: list[_List], inside: list[_List]) -> Iterator[_List]:
    """Yield the lists next to lists of bare attentions, which have the other half of each block."""
    bare = {(_parent(found.name), len(found.module)) for found in chosen if not found.has("Norm")}
    yield from (found for found in inside if (_parent(found.name), len(found.module)) in bare)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _role_at_root(model: nn.Module) -> str:
    return "base" if _base_of(model) is not None else "plain"


def _base_of(module: nn.Module) -> nn.Module | None:
    """Return the base model of a `PreTrainedModel` (maybe itself), or None for any other module."""
    prefix = getattr(type(module), "base_model_prefix", None)
    if not isinstance(prefix, str):
        return None
    base = module._modules.get(prefix) if prefix else None
    return module if base is None else base


def _lists(module: nn.Module, name: str, role: str, base: nn.Module | None) -> Iterator[_List]:
    """Yield every list in a module, but none that is inside another.

    Args:
        base: the base model to come, where the module is a part of a `PreTrainedModel` outside it.
    """
    found = _base_of(module)
    if found is not None and (role != "head" or module is base):  # a model beside the base model is part of the head
        # One inside another is a component, and what it has around its own base model does not count as a task head.
        around = "plain" if role == "base" and name else "head"
        role, base = ("base", None) if found is module else (around, found)
    elif module is base:
        role, base = "base", None
    if isinstance(module, nn.ModuleList) and name:
        yield _List(name, module, role)
        return
    for key, child in module.named_children():
        yield from _lists(child, f"{name}.{key}" if name else key, role, base)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of the transformer blocks some weights are.

    Attributes:
        covered: entries of those weights inside the blocks.
        total: entries of all weights in the blocks: everything with two or more dimensions but embedding tables.
        missed: what is neither covered nor in linear layers, by kind, as in
            "model.layers.*.mlp.experts.gate_up_proj (parameter)" -> entries.
        unsupported: those of them that no target can name.
    """

    covered: int
    total: int
    missed: dict[str, int]
    unsupported: frozenset[str] = frozenset()

    @property
    def share(self) -> float:
        """Fraction covered, in [0, 1]; 1 where there are no blocks."""
        return self.covered / self.total if self.total else 1.0

    def describe_missed(self, limit: int = 6) -> str:
        """Return the kinds that are missed, the largest first, each with its share of the blocks."""
        kinds = sorted(self.missed.items(), key=lambda kind: -kind[1])
        listed = [f"{name}: {entries / self.total:.1%}" for name, entries in kinds[:limit]]
        return ", ".join(listed) + (f" and {len(kinds) - limit} more" if len(kinds) > limit else "")


def block_coverage(model: nn.Module, names: Collection[str]) -> Coverage:
    """Measure how much of the transformer blocks some weights are.

    Args:
        names: of their layers, as in `named_modules`; of the weights where a module has several.
    """
    prefixes, wanted, owners = tuple(block_prefixes(model)), set(names), count_owners(model)
    covered = total = 0
    missed: dict[str, int] = {}
    unsupported: set[str] = set()
    for name, module in model.named_modules():
        if not name.startswith(prefixes) or ".parametrizations" in name:
            continue
        if isinstance(module, (nn.Embedding, LowRankPart)):
            continue
        for attribute, entries, default, supported in _matrices(module, owners):
            path = name if attribute == "weight" else f"{name}.{attribute}"
            if path in wanted:
                covered += entries
                continue
            total += entries
            if not default:
                what = type(module).__name__ if attribute == "weight" else "parameter"
                kind = f"{kind_of_name(path)} ({what})"
                missed[kind] = missed.get(kind, 0) + entries
                unsupported.update(() if supported else (kind,))
    return Coverage(covered, covered + total, missed, frozenset(unsupported))


def _matrices(module: nn.Module, owners: Counter[int]) -> Iterator[tuple[str, int, bool, bool]]:
    """Yield name and entries of the weights that a module holds, whether it is a default target, and one at all."""
    slots = slots_of(module)
    for slot in slots:
        own = owners.get(id(module._parameters.get(slot.attribute)), 1) == 1
        yield slot.attribute, math.prod(slot.shape), own and is_linear(module), own
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim > 1 and all(slot.attribute != key for slot in slots):
            yield key, parameter.numel(), False, False
