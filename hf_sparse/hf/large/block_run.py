"""Going through the blocks of a lazy model: each is loaded, pruned, kept on disk, and freed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ...errors import RecipeError
from ...pruning.calibrated.outliers import outlier_shares
from ...pruning.calibrated.recording import Recording, encoded, record
from ...pruning.calibrated.tasks import OnLayer, Task, prune_block, tasks_of
from ...pruning.calibrated.walk import Chain, ChainStep, Step
from ...pruning.group import PruningGroup
from ...pruning.selection import Owl
from ...utils.atomic_io import read_json, write_text
from .lazy_model import LazyModel
from .work_folder import WorkFolder

Batch = Mapping[str, Any]


class BlockRun:
    """Blocks of a lazy model, one after the other.

    Args:
        lazy: with nothing loaded.
        stacks: names of blocks: of one stack, or of an encoder and the decoder behind it.
        batches: keyword arguments of the model.
        work: what is kept of the run.
        spill: keep hidden states there too.
    """

    def __init__(
        self, lazy: LazyModel, stacks: Sequence[Sequence[str]], batches: Sequence[Batch], work: WorkFolder, spill: bool
    ) -> None:
        self.lazy, self.stacks, self.batches, self.work, self.spill = lazy, stacks, batches, work, spill
        self.names = [name for stack in stacks for name in stack]
        self.model, self.layers = lazy.model, self.names
        lazy.load_rest(self.names)

    def prune(self, groups: Sequence[PruningGroup], on_layer: OnLayer | None) -> None:
        """Prune the blocks that are not finished."""
        self._prepare_outliers(groups)
        tasks = tasks_of(groups, {})
        bar = tqdm(total=len(self.names), desc="Pruning block by block", initial=self.work.done, disable=None)
        with bar:
            for index, step in self._walk(self.work.done, self.work.activations if self.spill else None):
                prune_block(step, tasks, on_layer)
                weights = self._rounded(step.name, tasks)
                step.advance()
                self.work.save_block(index, weights)
                bar.update()

    def steps(self) -> Iterator[Step]:
        """Yield all blocks as they are in the checkpoint."""
        for _, step in self._walk(0, None):
            yield step

    def _walk(self, done: int, spill: Path | None) -> Iterator[tuple[int, ChainStep]]:
        """Yield each block that is not finished, loaded; the one before must have been advanced over.

        Args:
            done: how many are finished, of all stacks.
        """
        if done == len(self.names):
            return
        batches, start = self.batches, 0
        ended: list[Chain] = []
        for number, names in enumerate(self.stacks):
            is_last = number + 1 == len(self.stacks)
            recording = self._record(names, batches)
            blocks = [self.model.get_submodule(name) for name in names]
            folder = spill if spill is None or number == 0 else spill / f"stack-{number}"
            own = min(max(done - start, 0), len(names))
            chain = Chain(names, blocks, recording, batches, folder, own, self.lazy.device)
            for index in range(chain.done, len(names)):
                block = self.lazy.load_block(names[index])
                if index < own:
                    self._restore(start + index)
                    chain.advance(block, recording.calls[index])
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
        self.lazy.load_block(names[0])
        recording = record(self.model, [self.model.get_submodule(name) for name in names], batches)
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
        self.lazy.load_block(names[0])
        found = []
        for index, batch in enumerate(batches):
            outputs = encoded(self.model, blocks, batch, chain.activations.get(index))
            found.append({**batch, "encoder_outputs": outputs})
        self.lazy.unload(names[0])
        return found

    def _restore(self, index: int) -> None:
        """Put the pruned weights of a finished block into the block."""
        names = {key: name for name, key in self.lazy.keys.items()}
        for key, weight in self.work.load_block(index).items():
            parameter = self.model.get_parameter(names[key])
            parameter.data.copy_(weight)

    def _rounded(self, block: str, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
        """Round the pruned weights of a block to the type of the checkpoint, and return them by key."""
        found = {}
        for name, task in tasks.items():
            if name.startswith(f"{block}."):
                key = self.lazy.keys[f"{name}.weight"]
                stored = self.lazy.shards.get(key).dtype
                weight = task.layer.weight.data
                found[key] = weight.to(stored).cpu()
                weight.copy_(found[key])
        return found

    def _prepare_outliers(self, groups: Sequence[PruningGroup]) -> None:
        path = self.work.path / "outliers.json"
        for number, group in enumerate(groups):
            if not isinstance(group.selection, Owl):
                continue
            known: dict[str, Any] = read_json(path) or {}
            if str(number) not in known:
                known[str(number)] = outlier_shares(self, group.layers, group.selection.outlier)
                write_text(path, json.dumps(known) + "\n")
            shares = [float(known[str(number)][unit.members[0].layer_name]) for unit in group.units]
            group.selection.prepare_outliers(shares, [unit.module.weight.numel() for unit in group.units])
