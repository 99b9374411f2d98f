"""Weights that stack several matrices, each with inputs of its own: the experts of a mixture.

The router gives each expert other tokens, so each has its own statistics, and some may have none at all. The products
of the inputs of all experts of a block take a lot of memory: 52 GB in DeepSeek-V3. So they are gathered for as many
experts at a time as fit into a limit, and the block runs again for the next ones. Sums over tokens are the same however
the experts are divided, to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...modeling.layer_kinds import KeptTokens, Slot, kind_of
from ..processes import are_several
from .statistics import InputStatistics, check_part, compute_type

logger = logging.getLogger(__name__)

HELD_BYTES = 4 * 1024**3
"""Products of inputs of stacked matrices that are gathered at a time; those of one expert may be more."""

Pass = dict[str, range]
"""Which parts of which weights are observed while a block runs once."""


class StackObserver:
    """Forward hooks that gather statistics of the inputs of each matrix of some stacks.

    Args:
        weights: by name.
        with_products: names of those that need the products of their inputs.
        parts: of each weight.

    Attributes:
        found: statistics of each part, by name of the weight.
        called: names of the weights whose module was.
    """

    def __init__(self, weights: Mapping[str, Slot], with_products: Iterable[str], parts: Pass) -> None:
        self.weights = {name: weights[name] for name in parts}
        self.parts = parts
        self.products = set(with_products)
        self._kept: KeptTokens = lambda inputs: None
        self._handles: list[RemovableHandle] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        self.found = {name: {part: self._nothing(name) for part in parts} for name, parts in self.parts.items()}
        self.called: set[str] = set()

    def __enter__(self) -> StackObserver:
        modules: dict[nn.Module, dict[str, str]] = {}
        for name, slot in self.weights.items():
            modules.setdefault(slot.module, {})[slot.attribute] = name
        for module, names in modules.items():
            hook = self._hook(names)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, kept: KeptTokens) -> None:
        """Begin a batch.

        Args:
            kept: which tokens of it count.
        """
        self._kept = kept

    def sum_over_processes(self) -> None:
        """Add up what all processes have seen."""
        if are_several():
            for parts in self.found.values():
                for inputs in parts.values():
                    inputs.sum_over_processes()

    def each(self) -> Iterator[tuple[str, int]]:
        """Yield the parts that are observed."""
        yield from ((name, part) for name, parts in self.parts.items() for part in parts)

    def of(self, name: str, part: int) -> InputStatistics | None:
        """Return the statistics of one matrix; None if it was given no token.

        Raises:
            SparsityError: if it had inputs that are not finite.
        """
        inputs = self.found[name][part]
        return inputs.checked(f"{name}[{part}]") if inputs.tokens else None

    def _nothing(self, name: str) -> InputStatistics:
        slot = self.weights[name]
        weight = slot.tensor
        columns = slot.part_view.matrix_shape[1]
        return InputStatistics(columns, name in self.products, compute_type(weight), weight.device)

    def _hook(self, names: Mapping[str, str]) -> Callable[..., None]:
        parts = sorted({part for name in names.values() for part in self.parts[name]})

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kind = kind_of(module)
            assert kind is not None
            self.called.update(names.values())
            for attribute, part, rows in kind.part_inputs(module, args, kwargs, parts, self._kept):
                if attribute in names:
                    self.found[names[attribute]][part].add(rows)

        return hook


def passes_over(weights: Mapping[str, Slot], with_products: Iterable[str], limit: int | None = None) -> list[Pass]:
    """Return the parts that are observed together, for all parts of all weights; weights of one module together.

    Modules come in reverse order: what is pruned in one pass changes nothing that comes before it in the block.

    Args:
        limit: bytes of products that are held at a time; None = `HELD_BYTES`.
    """
    products = set(with_products)
    modules: dict[nn.Module, list[str]] = {}
    for name, slot in weights.items():
        modules.setdefault(slot.module, []).append(name)
    found: list[Pass] = []
    limit, left = HELD_BYTES if limit is None else limit, 0
    for names in reversed(modules.values()):
        each = sum(_product_bytes(weights[name]) for name in names if name in products)
        for part in range(weights[names[0]].parts or 0):
            if not found or each > left:
                found.append({})
                left = limit
            left -= each
            for name in names:
                begin = found[-1][name].start if name in found[-1] else part
                found[-1][name] = range(begin, part + 1)
    return found


def _product_bytes(slot: Slot) -> int:
    columns = slot.part_view.matrix_shape[1]
    return int(columns * columns * compute_type(slot.tensor).itemsize)


class Unreached:
    """Experts that no token of the calibration data reached, named once at the end.

    Args:
        total: how many experts there are, of the blocks so far.
        missed: those, as `(name of the module, number)`.
    """

    def __init__(self, total: int = 0, missed: Iterable[tuple[str, int]] = ()) -> None:
        self.total, self.missed = total, list(missed)
        self._tokens: dict[str, dict[int, int]] = {}
        self._called: set[str] = set()

    def add(self, observer: StackObserver) -> None:
        """Take what was observed of a block."""
        for name, parts in observer.found.items():
            module = name.rpartition(".")[0]
            tokens = self._tokens.setdefault(module, {})
            tokens.update({part: max(tokens.get(part, 0), inputs.tokens) for part, inputs in parts.items()})
            if name in observer.called:
                self._called.add(module)

    def end_block(self) -> None:
        """Count the experts of a block, of which everything was added.

        Raises:
            SparsityError: if none of the experts of a module had any token.
        """
        for module, tokens in self._tokens.items():
            count = sum(tokens.values())
            check_part(module, called=module in self._called or count > 0, tokens=count)
            self.total += len(tokens)
            self.missed += [(module, part) for part, own in sorted(tokens.items()) if not own]
        self._tokens.clear()

    def warn(self) -> None:
        """Name them, if there are any."""
        if self.missed:
            module, number = self.missed[0]
            share = len(self.missed) / self.total
            logger.warning(
                f"{len(self.missed)} of {self.total} experts ({share:.1%}) were given no token of the calibration "
                f"batches (first: expert {number} of '{module}'). Nothing is known of their inputs, so they are pruned "
                "by magnitude, and what is kept of them does not change. More or other batches reach more experts"
            )
