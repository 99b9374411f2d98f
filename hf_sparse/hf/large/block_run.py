"""Going through the blocks of a lazy model: each is loaded, pruned, kept on disk, and freed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ...errors import RecipeError
from ...pruning.calibrated.activations import moved
from ...pruning.calibrated.one_block import inside, prune_block
from ...pruning.calibrated.outliers import outlier_shares
from ...pruning.calibrated.recording import Recording, encoded, record
from ...pruning.calibrated.stacks import Unreached
from ...pruning.calibrated.tasks import OnLayer, Task, tasks_of
from ...pruning.calibrated.walk import Chain, ChainStep, Step, StillStep
from ...pruning.group import PruningGroup
from ...pruning.selection import Owl
from ...utils.atomic_io import read_json, write_text
from .device_map import Placement
from .lazy_model import LazyModel
from .work_folder import WorkFolder

Batch = Mapping[str, Any]


class BlockRun:
    """Blocks of a lazy model, one after the other.

    Args:
        lazy: with nothing loaded.
        stacks: names of blocks: of one stack, or of an encoder and the decoder behind it.
        batches: keyword arguments of the model; None = no block is run.
        places: where what.
        work: what is kept of the run.
        spill: keep hidden states there too.
    """

    def __init__(
        self,
        lazy: LazyModel,
        stacks: Sequence[Sequence[str]],
        batches: Sequence[Batch] | None,
        places: Placement,
        work: WorkFolder,
        spill: bool,
    ) -> None:
        self.lazy, self.stacks, self.work, self.spill, self.places = lazy, stacks, work, spill, places
        self.batches = None if batches is None else [moved(dict(batch), places.rest) for batch in batches]
        self.names = [name for stack in stacks for name in stack]
        self.model, self.layers = lazy.model, self.names
        if batches is not None:
            lazy.load_rest(self.names, places.rest)

    def prune(self, groups: Sequence[PruningGroup], on_layer: OnLayer | None) -> None:
        """Prune the blocks that are not finished."""
        self._prepare_outliers(groups)
        tasks = tasks_of(groups, {})
        unreached = Unreached(**self.work.experts)
        bar = tqdm(total=len(self.names), desc="Pruning block by block", initial=self.work.done, disable=None)
        with bar:
            for index, step in self._walk(self.work.done, self.work.activations if self.spill else None):
                prune_block(step, tasks, on_layer, unreached)
                weights = self._rounded(step, tasks)
                step.advance()
                self.work.note_experts(index, unreached.total, unreached.missed)
                self.work.save_block(index, weights)
                bar.update()
        unreached.warn()

    def steps(self) -> Iterator[Step]:
        """Yield all blocks as they are in the checkpoint."""
        for _, step in self._walk(0, None):
            yield step

    def _walk(self, done: int, spill: Path | None) -> Iterator[tuple[int, Step]]:
        """Yield each block that is not finished, loaded; the one before must have been advanced over.

        Args:
            done: how many are finished, of all stacks.
        """
        if self.batches is None:
            for index in range(done, len(self.names)):
                self._load(self.names[index])
                yield index, StillStep(self.names[index], self.model.get_submodule(self.names[index]))
                self.lazy.unload(self.names[index])
        elif done < len(self.names):
            yield from self._run(self.batches, done, spill)

    def _run(self, batches: Sequence[Batch], done: int, spill: Path | None) -> Iterator[tuple[int, Step]]:
        """Yield each block that is not finished, with what the blocks before it give."""
        start = 0
        ended: list[Chain] = []
        for number, names in enumerate(self.stacks):
            is_last = number + 1 == len(self.stacks)
            recording = self._record(names, batches)
            blocks = [self.model.get_submodule(name) for name in names]
            folder = spill if spill is None or number == 0 else spill / f"stack-{number}"
            own = min(max(done - start, 0), len(names))
            devices = [self.places.blocks[name] for name in names]
            chain = Chain(names, blocks, recording, batches, folder, own, devices)
            for index in range(chain.done, len(names)):
                self._load(names[index])
                if index < own:
                    self.lazy.restore(self.work.load_block(start + index))
                    chain.advance(index)
                else:
                    yield start + index, ChainStep(chain, index, last=is_last and index + 1 == len(names))
                chain.drop_before()
                self.lazy.unload(names[index])
            ended.append(chain)  # with its files: a run that is killed from here on begins with them
            if not is_last:
                batches = self._behind(names, batches, chain)
                start += len(names)
        for chain in ended:
            chain.activations.clear()

    def _record(self, names: Sequence[str], batches: Sequence[Batch]) -> Recording:
        self._load(names[0])
        blocks = [self.model.get_submodule(name) for name in names]
        recording = record(self.model, blocks, batches, self.places.blocks[names[0]])
        if recording is None:
            raise RecipeError(
                f"the blocks from '{names[0]}' on do not hand their hidden states straight to each other, so they "
                "cannot be loaded one by one. Use hf_sparse.sparsify"
            )
        self.lazy.unload(names[0])
        return recording

    def _behind(self, names: Sequence[str], batches: Sequence[Batch], chain: Chain) -> list[dict[str, Any]]:
        """Return the batches as a decoder needs them, with what its encoder has made of them."""
        blocks = [self.model.get_submodule(name) for name in names]
        self._load(names[0])
        found = []
        for index, batch in enumerate(batches):
            hidden = chain.activations.get(index, self.places.rest)
            outputs = encoded(self.model, blocks, batch, hidden, self.places.blocks[names[0]])
            found.append({**batch, "encoder_outputs": outputs})
        self.lazy.unload(names[0])
        return found

    def _load(self, name: str) -> None:
        self.lazy.load_block(name, self.places.blocks[name])

    def _rounded(self, step: Step, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
        """Round the pruned weights of a block to the type of the checkpoint, and return them by key."""
        found = self.lazy.stored({tasks[name].member.name: tasks[name].weight for name in inside(step, tasks)})
        self.lazy.restore(found)
        return found

    def _prepare_outliers(self, groups: Sequence[PruningGroup]) -> None:
        path = self.work.path / "outliers.json"
        for number, group in enumerate(groups):
            if not isinstance(group.selection, Owl):
                continue
            known: dict[str, Any] = read_json(path) or {}
            if str(number) not in known:
                known[str(number)] = outlier_shares(self, group.slots, group.selection.outlier)
                write_text(path, json.dumps(known) + "\n")
            shares = [float(known[str(number)][unit.members[0].layer_name]) for unit in group.units]
            group.selection.prepare_outliers(shares, [math.prod(unit.members[0].shape) for unit in group.units])
