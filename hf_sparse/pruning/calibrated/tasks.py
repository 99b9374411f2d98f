"""What is to be done to each layer when its block is reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...config.sparsity import RECONSTRUCTIONS
from ...errors import SparsityError
from ...modeling.layer_kinds import MatrixLayer, MatrixView, oriented
from ..compressions import Compression, FormGroup
from ..group import PruningGroup
from ..patterns import OnMatrix
from ..scorers import Choice, InputScorer, Scorer
from ..unit import Member
from .reconstruction import Reconstruction
from .statistics import InputStatistics, compute_type


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """What pruning has done to one layer.

    Attributes:
        name: of the layer.
        sparsity: fraction of zeros in its weight, in [0, 1].
        change: Frobenius norm of what the kept entries were changed by, relative to that of the dense weight.
        error: `‖(W - W_dense) X‖² / ‖W_dense X‖²` on its calibration inputs; None where only their norms were kept. Of
            stacked experts both are summed over the experts, each with its own tokens.
    """

    name: str
    sparsity: float
    change: float
    error: float | None


OnLayer = Callable[[LayerUpdate], None]


@dataclasses.dataclass
class Tally:
    """What a `LayerUpdate` is computed from, summed over the matrices of a weight."""

    entries: int = 0
    zeros: int = 0
    changed: float = 0.0
    norm: float = 0.0
    lost: float = 0.0
    given: float = 0.0

    def add(self, dense: Tensor, new: Tensor, kept: Tensor) -> None:
        """Add a matrix."""
        self.entries += new.numel()
        self.zeros += new.numel() - int(torch.count_nonzero(new))
        self.norm += float(torch.linalg.vector_norm(dense)) ** 2
        self.changed += float(torch.linalg.vector_norm((new - dense).masked_fill_(~kept, 0.0))) ** 2

    def add_outputs(self, dense: Tensor, new: Tensor, inputs: InputStatistics) -> None:
        """Add `‖(W - W_dense) X‖²` and `‖W_dense X‖²` of a matrix."""
        hessian, change = inputs.hessian(), new - dense
        tokens = inputs.tokens / 2
        self.given += float(((dense @ hessian) * dense).sum()) * tokens
        self.lost += float(((change @ hessian) * change).sum()) * tokens

    def update(self, name: str, with_error: bool) -> LayerUpdate:
        """Return the update of the layer with this name."""
        change = (self.changed / self.norm) ** 0.5 if self.norm else self.changed**0.5
        error = None if not with_error else self.lost / self.given if self.given else 0.0
        return LayerUpdate(name, self.zeros / max(1, self.entries), change, error)


@dataclasses.dataclass(frozen=True)
class Task:
    """One weight.

    Args:
        mask: which entries stay, as the weight is stored, if that is known before its block is reached; else `scorer`
            and `choice` decide.
        compression: that goes beside the weight.
    """

    member: Member
    scorer: InputScorer | None
    choice: Choice | None
    mask: Tensor | None
    reconstruction: Reconstruction | None
    compression: Compression | None = None

    @property
    def layer(self) -> MatrixLayer:
        """The layer."""
        return self.member.module

    @property
    def weight(self) -> Tensor:
        """The weight as it is stored."""
        return self.member.slot.tensor.data

    @property
    def needs_products(self) -> bool:
        """Whether the products of its inputs are needed."""
        if self.compression is not None or self.reconstruction is not None:
            return True
        return self.scorer is not None and self.scorer.needs_products

    @property
    def needs_inputs(self) -> bool:
        """Whether anything depends on its inputs."""
        return self.needs_products or not (self.scorer is None or isinstance(self.scorer, EntryScores))

    def apply(self, inputs: InputStatistics | None) -> LayerUpdate:
        """Prune the weight in place.

        Args:
            inputs: None where it `needs_inputs` not.
        """
        tally = Tally()
        self._apply(self.weight, self.member.slot.view, self.mask, inputs, tally)
        return tally.update(self.member.layer_name, self.needs_products)

    def apply_part(self, part: int, mask: Tensor | None, inputs: InputStatistics | None, tally: Tally) -> None:
        """Prune one matrix of a stack in place.

        Args:
            mask: of the whole stack, see `mask_of_stack`.
            inputs: None if nothing is known of them: then the largest entries stay as they are.
            tally: that the matrix is added to.
        """
        own = None if mask is None else mask[part]
        self._apply(self.weight[part], self.member.slot.part_view, own, inputs, tally)

    def mask_of_stack(self) -> Tensor | None:
        """Return which entries of a stack stay, where all of its matrices compete and no inputs matter."""
        if not isinstance(self.scorer, EntryScores) or self.choice is None:
            return self.mask
        pattern, weight = self.member.pattern, self.weight
        scores = pattern.pool(self.scorer.element_scores(weight))
        return pattern.expand(self.choice.selection.select_alone(scores, self.choice.sparsity), tuple(weight.shape))

    def _apply(
        self, weight: Tensor, view: MatrixView, mask: Tensor | None, inputs: InputStatistics | None, tally: Tally
    ) -> None:
        dense = view.to_matrix(weight).to(compute_type(weight))
        if bool(dense.isnan().any()):
            raise SparsityError(f"there are NaN among the entries of '{self.member.name}', so nothing can be selected")
        new, kept = self._pruned(dense, None if mask is None else view.to_matrix(mask), inputs)
        new = new.masked_fill(~kept, 0.0)
        if self.reconstruction is not None and inputs is not None:
            new = self.reconstruction.fit(new, kept, dense, inputs).masked_fill_(~kept, 0.0)
        computed = new
        if self.compression is not None:
            assert inputs is not None
            computed = new + self.compression.add_fitted(self.layer, dense - new, inputs.hessian())
        # Before the copy, which may be into the tensor `dense` itself.
        tally.add(dense, new, kept)
        if self.needs_products and inputs is not None:
            tally.add_outputs(dense, computed, inputs)
        weight.copy_(view.to_stored(new))

    def _pruned(self, dense: Tensor, mask: Tensor | None, inputs: InputStatistics | None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            return dense, mask
        assert self.scorer is not None
        assert self.choice is not None
        if isinstance(self.scorer, EntryScores):
            return dense, self.choice(self.scorer.element_scores(dense))
        if inputs is None:
            return dense, self.choice(dense.abs())
        return self.scorer.prune(dense, inputs, self.choice)


@dataclasses.dataclass(frozen=True)
class FormTask:
    """One layer that gets another form in the place of its weight.

    Args:
        model: that the layer is in.
        name: of the layer.
    """

    model: nn.Module
    name: str
    layer: MatrixLayer
    compression: Compression
    needs_products: bool = True
    needs_inputs: bool = True

    def apply(self, inputs: InputStatistics | None) -> LayerUpdate:
        """Replace the layer."""
        assert inputs is not None
        weight = oriented(self.layer, self.layer.weight.data)
        dense = weight.to(compute_type(weight))
        new = self.compression.replace_fitted(self.model, self.name, self.layer, inputs.hessian())
        tally = Tally()
        tally.add(dense, new, torch.ones_like(dense, dtype=torch.bool))
        tally.add_outputs(dense, new, inputs)
        return dataclasses.replace(tally.update(self.name, True), sparsity=0.0)


AnyTask = Task | FormTask


class EntryScores(InputScorer):
    """A scorer that looks at one weight alone, when its block is reached."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def element_scores(self, weight: Tensor) -> Tensor:
        return self._scorer.element_scores(weight)


def tasks_of(groups: Sequence[PruningGroup], masks: Mapping[str, Tensor]) -> dict[str, Task]:
    """Return the tasks of all layers, by name.

    Args:
        masks: of weights that are chosen before, by name of the layer; the others when their block is reached.
    """
    tasks = {}
    for group in groups:
        spec = group.config.reconstruction
        reconstruction = None if spec is None else RECONSTRUCTIONS.build(spec)
        for index, unit in enumerate(group.units):
            for member in unit.members:
                scorer, choice = None, None
                if member.layer_name not in masks:
                    pattern = member.pattern.inner if isinstance(member.pattern, OnMatrix) else member.pattern
                    sparsity = group.selection.sparsity_of(index, group.sparsity)
                    scorer = group.scorer if isinstance(group.scorer, InputScorer) else EntryScores(group.scorer)
                    choice = Choice(pattern, group.selection, sparsity)
                name = member.layer_name
                compression = group.compression
                tasks[name] = Task(member, scorer, choice, masks.get(name), reconstruction, compression)
    return tasks


def form_tasks(model: nn.Module, groups: Sequence[FormGroup]) -> dict[str, FormTask]:
    """Return the tasks of the layers that get another form, fitted to their inputs, by name; not embeddings."""
    return {
        name: FormTask(model, name, layer, group.compression)
        for group in groups
        if group.compression.fits_inputs
        for name, layer in group.layers.items()
        if not isinstance(layer, nn.Embedding)
    }
