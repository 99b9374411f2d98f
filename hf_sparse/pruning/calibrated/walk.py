"""Going through a model block by block, each with the inputs that the pruned blocks before it give.

Where blocks hand their hidden states straight to each other, as the layers of nearly all transformers do, each block is
run alone, from the kept outputs of the block before. Elsewhere (a model that works on hidden states between blocks, a
block that is called several times, a layer outside of all blocks) the model runs from its beginning up to the block:
the same inputs, for more time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ...errors import SparsityError
from ...modeling.blocks import block_prefixes
from ...modeling.layer_kinds import KeptTokens
from .activations import Activations
from .recording import Batch, Recording, Stop, record, run_model
from .statistics import not_called
from .tokens import kept_tokens

logger = logging.getLogger(__name__)

Begin = Callable[[KeptTokens], None]
"""Called before each batch, with what tells its tokens from padding."""


class Step(Protocol):
    """One block, at the time when all blocks before it are pruned.

    Attributes:
        name: of the block in the model.
        module: the block.
    """

    name: str
    module: nn.Module

    def run(self, begin: Begin) -> None:
        """Run the block on all batches, to be observed."""

    def advance(self) -> None:
        """Run the block once more, as it is now, for the inputs of the next one."""


class Steps(Protocol):
    """What goes through blocks."""

    def steps(self) -> Iterator[Step]:
        """Yield each block; the one before must have been advanced over."""


class ChainStep:
    """A block that runs alone.

    Args:
        last: whether no block comes after it, which would need its outputs.
    """

    def __init__(self, chain: Chain, index: int, last: bool) -> None:
        self.name, self.module = chain.names[index], chain.blocks[index]
        self._chain, self._index, self._last = chain, index, last

    def run(self, begin: Begin) -> None:
        device = self._chain.devices[self._index]
        for number, call in enumerate(self._chain.recording.calls[self._index]):
            there = call.on(device)
            begin(kept_tokens(self._chain.batches[number], self.name, there))
            there.run(self.module, self._chain.activations.get(number, device))

    def advance(self) -> None:
        if not self._last:
            self._chain.advance(self._index)


class Chain:
    """Blocks that hand their hidden states to each other, and those that go into the next of them.

    Args:
        names, blocks: in the order of their calls.
        recording: of their calls.
        batches: that were recorded.
        spill: folder for hidden states; None = they stay in memory.
        done: how many blocks have been advanced over before, by a process whose folder this is. If their outputs are
            not there (any more), the chain begins at its first block.
        devices: of each block, where hidden states are on the CPU between them; None = they stay where they are.
    """

    def __init__(
        self,
        names: Sequence[str],
        blocks: Sequence[nn.Module],
        recording: Recording,
        batches: Sequence[Batch],
        spill: Path | None = None,
        done: int = 0,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.names, self.blocks, self.recording, self.batches = list(names), list(blocks), recording, batches
        self.spill, self.on_cpu = spill, devices is not None
        self.devices: Sequence[torch.device | None] = devices or [None] * len(self.names)
        self.activations = self._before(done)
        self.done = done if done and self.activations.complete else 0
        if not self.done:
            self.activations = self._before(0)
            for index, hidden in enumerate(recording.hidden):
                self.activations.put(index, hidden)
        recording.hidden.clear()

    def _before(self, done: int) -> Activations:
        folder = None if self.spill is None else self.spill / f"before-{done:04}"
        return Activations(len(self.batches), folder, self.on_cpu)

    def advance(self, index: int) -> None:
        """Replace what goes into a block by what comes out of it. A folder of files is left for `drop_before`."""
        before, self.done = self.activations, self.done + 1
        self.activations = self._before(self.done)
        device = self.devices[index]
        for number, call in enumerate(self.recording.calls[index]):
            self.activations.put(number, call.on(device).run(self.blocks[index], before.get(number, device)))
            before.drop(number)

    def drop_before(self) -> None:
        """Remove the files of what went into the block before."""
        if self.done and self.spill is not None:
            self._before(self.done - 1).clear()


class ReplayStep:
    """A block whose inputs come from running the model up to it.

    Args:
        before: the block that is called next, where the model may stop; None = at its end.
    """

    def __init__(
        self, model: nn.Module, name: str, module: nn.Module, batches: Sequence[Batch], before: nn.Module | None
    ) -> None:
        self.name, self.module = name, module
        self._model, self._batches, self._before = model, batches, before

    def run(self, begin: Begin) -> None:
        handle = None if self._before is None else self._before.register_forward_pre_hook(_stop)
        try:
            for batch in self._batches:
                begin(kept_tokens(batch, self.name, None))
                run_model(self._model, batch)
        finally:
            if handle is not None:
                handle.remove()

    def advance(self) -> None:
        return


def _stop(*_: object) -> None:
    raise Stop


class StillStep:
    """A block that is not run: nothing that is done to it depends on its inputs."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def run(self, begin: Begin) -> None:
        raise RuntimeError(f"'{self.name}' has no inputs to be observed")  # pragma: no cover

    def advance(self) -> None:
        return


class Walk:
    """The blocks of a model in the order in which they run.

    Args:
        model: runs as in evaluation.
        batches: keyword arguments of the model.
        layers: names of the layers or weights that matter; a block without any is passed over where that is possible.
        spill: folder for hidden states; None = they stay in memory.

    Raises:
        SparsityError: if there is no batch.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], layers: Iterable[str], spill: Path | None = None
    ) -> None:
        self.model, self.batches, self.spill = model, list(batches), spill
        if not self.batches:
            raise SparsityError("scorers that look at the inputs of layers need data, and there was no batch")
        modules = {name for name, _ in model.named_modules()}
        # Of a module with several weights, each has a name.
        self.layers = list(dict.fromkeys(name if name in modules else name.rpartition(".")[0] for name in layers))
        self.lists = [prefix for prefix in block_prefixes(model) if any(n.startswith(prefix) for n in self.layers)]

    @property
    def count(self) -> int:
        """How many blocks there are, and layers outside of all blocks."""
        outside = [layer for layer in self.layers if not layer.startswith(tuple(self.lists))]
        return sum(map(self._is_block, dict(self.model.named_modules()))) + len(outside)

    def names(self) -> list[str]:
        """Return the blocks, and the layers outside of all blocks, in the order of their first call.

        Raises:
            SparsityError: for a layer that takes no part.
        """
        modules = dict(self.model.named_modules())
        units = [name for name in modules if self._is_block(name)]
        units += [name for name in self.layers if not name.startswith(tuple(f"{unit}." for unit in units))]
        order: dict[str, None] = {}
        handles = [
            modules[name].register_forward_pre_hook(lambda *_, name=name: order.setdefault(name)) for name in units
        ]
        try:
            for batch in self.batches:  # nearly always all of them in the first
                run_model(self.model, batch)
                if len(order) == len(units):
                    break
        finally:
            for handle in handles:
                handle.remove()
        for name in units:
            missed = [layer for layer in self.layers if layer == name or layer.startswith(f"{name}.")]
            if name not in order and missed:
                raise not_called(missed[0])
        return list(order)

    def _is_block(self, name: str) -> bool:
        head, _, tail = name.rpartition(".")
        return tail.isdigit() and f"{head}." in self.lists

    @torch.no_grad()
    def steps(self) -> Iterator[Step]:
        """Yield each block; the one before must have been advanced over."""
        modules = dict(self.model.named_modules())
        names = self._one_list()
        recording = record(self.model, [modules[name] for name in names], self.batches) if names else None
        if recording is not None:
            yield from self._along(names, recording)
            return
        order = self.names()
        start = 0
        while start < len(order):
            end = self._chain_end(order, start)
            names = order[start:end]
            blocks = [modules[name] for name in names]
            recording = record(self.model, blocks, self.batches) if self._is_block(names[0]) else None
            if recording is not None:
                yield from self._along(names, recording)
            else:
                if len(names) > 1:
                    logger.warning(
                        f"the blocks from '{names[0]}' on do not hand their hidden states straight to each other, so "
                        "the model runs from its beginning for each of them, which takes longer"
                    )
                for place in range(start, end):
                    before = modules[order[place + 1]] if place + 1 < len(order) else None
                    yield ReplayStep(self.model, order[place], modules[order[place]], self.batches, before)
            start = end

    def _along(self, names: Sequence[str], recording: Recording) -> Iterator[Step]:
        modules = dict(self.model.named_modules())
        blocks = [modules[name] for name in names]
        chain = Chain(names, blocks, recording, self.batches, self._folder(names[0]))
        for index in range(len(names)):
            yield ChainStep(chain, index, last=index + 1 == len(names))
            chain.drop_before()
        chain.activations.clear()

    def _one_list(self) -> list[str]:
        """Return the blocks up to the last one with a layer that matters, if all these are in one list of blocks."""
        if len(self.lists) != 1 or not all(layer.startswith(self.lists[0]) for layer in self.layers):
            return []
        last = max(int(layer[len(self.lists[0]) :].partition(".")[0]) for layer in self.layers)
        return [f"{self.lists[0]}{number}" for number in range(last + 1)]

    def _chain_end(self, order: Sequence[str], start: int) -> int:
        """Return where the blocks of the same list that follow each other end."""
        if not self._is_block(order[start]):
            return start + 1
        owner, number = order[start].rpartition(".")[::2]
        end = start + 1
        while end < len(order) and order[end] == f"{owner}.{int(number) + end - start}":
            end += 1
        return end

    def _folder(self, name: str) -> Path | None:
        return None if self.spill is None else self.spill / name.replace(".", "-")
