"""What is to be done to each layer when its block is reached."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...config.sparsity import RECONSTRUCTIONS
from ...errors import SparsityError
from ...modeling.layer_kinds import MatrixLayer, Slot, oriented
from ..compressions import Compression, FormGroup
from ..group import PruningGroup
from ..patterns import OnMatrix
from ..processes import have_same
from ..scorers import Choice, InputScorer, Scorer
from ..unit import Member
from .reconstruction import Reconstruction
from .statistics import InputObserver, InputStatistics, UnsharedInputError, compute_type
from .walk import Step


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """What pruning has done to one layer.

    Attributes:
        name: of the layer.
        sparsity: fraction of zeros in its weight, in [0, 1].
        change: Frobenius norm of what the kept entries were changed by, relative to that of the dense weight.
        error: `‖(W - W_dense) X‖² / ‖W_dense X‖²` on its calibration inputs; None where only their norms were kept.
    """

    name: str
    sparsity: float
    change: float
    error: float | None


OnLayer = Callable[[LayerUpdate], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """One layer.

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
    def needs_products(self) -> bool:
        """Whether the products of its inputs are needed."""
        if self.compression is not None or self.reconstruction is not None:
            return True
        return self.scorer is not None and self.scorer.needs_products

    def apply(self, inputs: InputStatistics) -> LayerUpdate:
        """Prune the weight in place."""
        weight = self.layer.weight.data
        dense = oriented(self.layer, weight).to(compute_type(weight))
        if bool(dense.isnan().any()):
            raise SparsityError(f"there are NaN among the entries of '{self.member.name}', so nothing can be selected")
        if self.mask is not None:
            new, kept = dense, oriented(self.layer, self.mask)
        else:
            assert self.scorer is not None
            assert self.choice is not None
            new, kept = self.scorer.prune(dense, inputs, self.choice)
        new = new.masked_fill(~kept, 0.0)
        if self.reconstruction is not None:
            new = self.reconstruction.fit(new, kept, dense, inputs).masked_fill_(~kept, 0.0)
        added = None
        if self.compression is not None:
            added = self.compression.add_fitted(self.layer, dense - new, inputs.hessian())
        # Before the copy, which may be into the tensor `dense` itself.
        update = self._update(dense, new, kept, added, inputs)
        weight.copy_(Slot(self.layer).view.to_stored(new))
        return update

    def _update(
        self, dense: Tensor, new: Tensor, kept: Tensor, added: Tensor | None, inputs: InputStatistics
    ) -> LayerUpdate:
        norm = float(torch.linalg.vector_norm(dense)) or 1.0
        change = float(torch.linalg.vector_norm((new - dense).masked_fill_(~kept, 0.0))) / norm
        error = None
        if self.needs_products:
            error = output_error(dense, new if added is None else new + added, inputs)
        zeros = new.numel() - int(torch.count_nonzero(new))
        return LayerUpdate(self.member.layer_name, zeros / max(1, new.numel()), change, error)


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

    def apply(self, inputs: InputStatistics) -> LayerUpdate:
        """Replace the layer."""
        weight = oriented(self.layer, self.layer.weight.data)
        dense = weight.to(compute_type(weight))
        new = self.compression.replace_fitted(self.model, self.name, self.layer, inputs.hessian())
        norm = float(torch.linalg.vector_norm(dense)) or 1.0
        change = float(torch.linalg.vector_norm(new - dense)) / norm
        return LayerUpdate(self.name, 0.0, change, output_error(dense, new, inputs))


AnyTask = Task | FormTask


def output_error(dense: Tensor, new: Tensor, inputs: InputStatistics) -> float:
    """Return `‖(W - W_dense) X‖² / ‖W_dense X‖²`."""
    hessian, change = inputs.hessian(), new - dense
    whole = float(((dense @ hessian) * dense).sum())
    return float(((change @ hessian) * change).sum()) / whole if whole else 0.0


class EntryScores(InputScorer):
    """A scorer that looks at one weight alone, when its block is reached."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def prune(self, weight: Tensor, inputs: InputStatistics, choice: Choice) -> tuple[Tensor, Tensor]:
        return weight, choice(self._scorer.element_scores(weight))


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


def inside(step: Step, names: Mapping[str, object]) -> list[str]:
    """Return which layers are in a block, or are it."""
    return [name for name in names if name == step.name or name.startswith(f"{step.name}.")]


def observe(step: Step, layers: Mapping[str, MatrixLayer], with_products: Sequence[str]) -> InputObserver:
    """Run a block on all batches and return what its layers were given, on all processes together."""
    observer = InputObserver(layers, with_products)
    shared: dict[str, str] | None = None
    with contextlib.suppress(UnsharedInputError), observer:
        step.run(observer.begin)
        shared = observer.leaders
    if not have_same(shared) or shared is None:  # every process goes the same way
        observer = InputObserver(layers, with_products, share=False)
        with observer:
            step.run(observer.begin)
    observer.sum_over_processes()
    return observer


def prune_block(step: Step, tasks: Mapping[str, AnyTask], on_layer: OnLayer | None) -> None:
    """Observe the layers of one block, and prune them."""
    found = {name: tasks[name] for name in inside(step, tasks)}
    if not found:
        return
    products = [name for name, task in found.items() if task.needs_products]
    observer = observe(step, {name: task.layer for name, task in found.items()}, products)
    for name, task in found.items():
        update = task.apply(observer.of(name))
        if on_layer is not None:
            on_layer(update)
