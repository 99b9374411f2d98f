"""A pruning group: one group of the config bound to a model. It knows when its masks are due, and makes them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..config.sparsity import PATTERNS, SCHEDULES, SCORERS, SELECTIONS, GroupConfig, SparsityConfig
from ..errors import PatternError, RecipeError, SparsityError
from ..modeling.layer_kinds import Slot, kind_of
from .compressions import Compression, bind_beside
from .masked_weight import check_free
from .patterns import OnMatrix, Pattern, Structure
from .schedules import Schedule
from .scorers import Scorer
from .selection import Selection, Uniform, in_multiples
from .shards import any_nan
from .unit import Member, Unit
from .unit_finding import find_units


@dataclasses.dataclass
class PruningGroup:
    """One group of the config, bound to a model.

    Attributes:
        units: the weights, with masks while `attached`.
        compression: that goes beside the sparse weights.
        progress: of the training at the last renewal.
        suspicious: a gradient since the last renewal was not finite.
    """

    config: GroupConfig
    scorer: Scorer
    pattern: Pattern
    selection: Selection
    schedule: Schedule
    sparsity: float
    units: list[Unit]
    compression: Compression | None = None
    progress: float = 0.0
    attached: bool = False
    suspicious: bool = False

    def sparsity_at(self, progress: float) -> float:
        """Return the scheduled sparsity; for a selection with a value, the scheduled fraction of that value."""
        return self.schedule(progress, self.sparsity)

    @property
    def current_sparsity(self) -> float:
        """Scheduled sparsity at the last renewal."""
        return self.sparsity_at(self.progress)

    @property
    def level(self) -> float:
        """Scheduled sparsity as a fraction of the final one, in [0, 1]."""
        return self.current_sparsity / self.sparsity if self.sparsity else 1.0

    def due(self, progress: float, step: int | None) -> bool:
        """Return whether the masks are to be renewed: every `every` steps, where the ramp or their freedom ends."""
        if step is None:
            return True
        before = progress * (step - 1) / step if step else 0.0
        if self.schedule.frozen(progress):
            # The first step behind that moment may have skipped it.
            return not self.schedule.frozen(before)
        if step % self.schedule.every == 0 or progress >= 1.0:
            return True
        return self.schedule.reached(progress) and not self.schedule.reached(before)

    def check_free(self, movable: Container[int] = ()) -> None:
        """Raise `RecipeError` if a weight cannot be given a mask, or is frozen though the scorer needs its gradient.

        Args:
            movable: `id`s of sharded parameters that can be given one.
        """
        for member in self.members:
            check_free(member.module, member.name, member.attribute, id(member.slot.parameter) in movable)
            if self.scorer.source == "gradients" and not member.weight.requires_grad:
                raise RecipeError(
                    f"scorer '{self.scorer.name}' looks at gradients, but '{member.name}' is frozen "
                    "(requires_grad=False) and has none. Unfreeze it, exclude it, or use scorer 'magnitude'"
                )

    @property
    def by_blocks(self) -> bool:
        """Whether it looks at the inputs of layers, so that it is pruned in one shot, block by block."""
        wants = self.scorer.source == "inputs" or self.selection.needs_inputs
        return wants or self.config.reconstruction is not None or self.compression is not None

    def check_observable(self) -> None:
        """Raise an error if it looks at inputs of layers, and those of a weight cannot be seen.

        Raises:
            RecipeError: if the inputs of a weight cannot be told from those of others.
            PatternError: if matrices that are stacked have inputs of their own, and a group lies in two of them.
        """
        for member in self.members if self.by_blocks else ():
            kind = kind_of(member.module)
            reason = None if kind is None else kind.not_observable(member.module)
            if reason is not None:
                raise RecipeError(
                    f"scorer '{self.scorer.name}' with selection '{self.selection.name}' needs the inputs of "
                    f"'{member.name}', and these cannot be observed: {reason}. Exclude it, or prune it in a group of "
                    "its own with scorer 'magnitude'"
                )
            if member.slot.parts is not None and self.scorer.source == "inputs":
                pattern = member.pattern.inner if isinstance(member.pattern, OnMatrix) else member.pattern
                pattern.check(member.slot.part_view.matrix_shape, member.name)

    def check_renewable(self) -> None:
        """Raise `RecipeError` if the masks cannot be renewed in training."""
        if self.by_blocks:
            name = f"scorer '{self.scorer.name}'" if self.scorer.source == "inputs" else ""
            name = name or (f"selection '{self.selection.name}'" if self.selection.needs_inputs else "")
            name = name or ("a reconstruction" if self.compression is None else f"'{self.compression.name}'")
            raise RecipeError(
                f"{name} looks at the inputs of layers and prunes in one shot, block by block, so no masks are "
                "renewed in training. Call hf_sparse.sparsify(model, config, batches) before; training keeps the zeros"
            )

    def attach(self) -> None:
        """Put a mask that keeps everything on each weight, and make the state of the scorer."""
        shared = self.scorer.shared_state(sum(member.weight.numel() for member in self.members))
        for unit in self.units:
            unit.make_masks(self.scorer.fields, shared)
            self.scorer.on_attach(unit)
            unit.attach()
        self.attached, self.suspicious = True, False

    def bake(self) -> None:
        """Make the zeros part of the weights and take the masks off."""
        for unit in self.units:
            unit.bake()
        self.attached = False

    def observe(self, scale: float) -> None:
        """Show the scorer the gradients of one optimizer step, if it looks at them."""
        if self.scorer.source != "gradients":
            return
        for unit in self.units:
            if unit.take_gradients(scale):
                self.scorer.on_gradient(unit)
            else:
                self.suspicious = True
            unit.drop_gradients()

    def renew(self, progress: float) -> bool:
        """Make the masks for this point of training, and return whether the weights were scored for it."""
        self.progress = progress
        scored = self.scorer.update(self)
        self.scorer.after_update(self)
        return scored

    def choose(self, score: Callable[[Unit], Tensor]) -> Iterator[tuple[Unit, Tensor]]:
        """Yield each unit with which of its groups to keep at the sparsity of the moment, by a score of each.

        Where weights do not compete with each other, the scores of one exist at a time, and the caller may change that
        unit before the next is scored.

        Raises:
            SparsityError: if there are NaN among the scores, naming the weights.
        """
        together = [[unit] for unit in self.units] if self.selection.weight_by_weight else [self.units]
        for units in together:
            scores = [score(unit) for unit in units]
            try:
                kept = self._chosen(self.selection, units, scores, self.current_sparsity)
            except SparsityError:
                broken = [unit.name for unit, tensor in zip(units, scores, strict=True) if any_nan([tensor])]
                if broken:
                    rest = self.units[self.units.index(units[-1]) + 1 :]
                    broken += [unit.name for unit in rest if any_nan([score(unit)])]
                    raise SparsityError(_nan_message("among the scores", broken)) from None
                raise
            del scores
            yield from zip(units, kept, strict=True)

    def _chosen(
        self, selection: Selection, units: Sequence[Unit], scores: list[Tensor], sparsity: float
    ) -> list[Tensor]:
        multiples = [self.pattern.multiple(unit.kind) for unit in units]
        return in_multiples(scores, multiples, lambda chunks: selection.select(chunks, sparsity))

    def reached(self) -> float:
        """Return the fraction of the groups that masks at the final sparsity remove, whole groups as they are."""
        sizes = [unit.groups for unit in self.units]
        scores = [torch.arange(size, dtype=torch.float32) for size in sizes]
        kept = self._chosen(copy.copy(self.selection), self.units, scores, self.sparsity)  # which keeps its threshold
        return 1 - sum(int(mask.sum()) for mask in kept) / sum(sizes)

    def check_finite(self) -> None:
        """Raise `SparsityError` if training has made NaN of weights, which the scores of this step have not seen.

        A loss of NaN makes entries of every weight NaN, so the smallest weight tells; after a gradient that was not
        finite, all are looked at.
        """
        members = self.members
        if not self.suspicious:
            members = [min(members, key=lambda member: member.masked.mask.numel())]
        self.suspicious = False
        broken = [member.name for member in members if any_nan([member.dense])]
        if broken:
            raise SparsityError(_nan_message("among the entries", broken))

    @property
    def members(self) -> list[Member]:
        """Every weight of the group."""
        return [member for unit in self.units for member in unit.members]

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Every layer with a weight in this group, by name; a module with several weights by their names."""
        return {member.layer_name: member.module for member in self.members}

    @property
    def slots(self) -> dict[str, Slot]:
        """Where every weight is, by the same names."""
        return {member.layer_name: member.slot for member in self.members}

    @property
    def hidden(self) -> list[nn.Parameter]:
        """The dense weights of all units, under their masks."""
        return [member.hidden for member in self.members]

    @property
    def scores(self) -> list[nn.Parameter]:
        """The learned scores of all units."""
        return [unit.masked.scores for unit in self.units if unit.masked.scores is not None] if self.attached else []


def _nan_message(where: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
    return (
        f"there are NaN {where} of '{names[0]}'{more}, so nothing can be selected. In training, the run has diverged: "
        "lower the learning rate, or look at the loss before this step. In one-shot pruning, the weights that were "
        "loaded or their gradients on the calibration data are NaN"
    )


def bind_group(model: nn.Module, config: GroupConfig) -> PruningGroup:
    """Bind a group of the config to a model.

    Raises:
        RecipeError: if a target matches nothing, or scorer and selection do not go together.
        PatternError: if the pattern does not fit a weight or a selection, or needs an architecture that is not known.
    """
    scorer, pattern = SCORERS.build(config.scorer), PATTERNS.build(config.pattern)
    of_pattern = pattern.own_selection()
    if of_pattern is not None and config.selection is not None:
        raise PatternError(
            f"pattern {pattern} has a selection of its own, the only one that suits it; leave selection "
            f"{config.selection!r} out"
        )
    chosen = SELECTIONS.build(config.selection) if config.selection is not None else None
    selection = of_pattern or chosen or scorer.own_selection() or Uniform()
    scorer.check_selection(selection)
    scorer.check_pattern(pattern)
    if config.reconstruction is not None:
        scorer.check_reconstruction()
    sparsity = config.sparsity if config.sparsity is not None else pattern.fixed_sparsity
    units = find_units(model, pattern, config.target_names, config.exclude_names)
    selection.prepare_units(units, pattern)
    # A selection with a value has no sparsity of its own: its schedule runs from 0 to all of that value.
    final = 1.0 if sparsity is None else float(sparsity)
    layers = {member.layer_name: member.module for unit in units for member in unit.members}
    compression = bind_beside(config, pattern, layers)
    return PruningGroup(config, scorer, pattern, selection, SCHEDULES.build(config.schedule), final, units, compression)


def joined(model: nn.Module, earlier: SparsityConfig, later: SparsityConfig) -> SparsityConfig:
    """Return what was requested of a model by two prunings, one after the other: for a weight of both, the later one.

    Args:
        model: as the later pruning found it, or with its masks.
    """
    if earlier == later:
        return later
    taken = {name for group in later.groups for name in _layers_of(model, group)}
    groups: list[GroupConfig] = []
    for group in earlier.groups:
        names = set(_layers_of(model, group))
        if names and names <= taken:
            continue
        again = sorted(names & taken)
        if again and not isinstance(PATTERNS.build(group.pattern), Structure):
            group = dataclasses.replace(group, exclude=(*group.exclude, *again))
        groups.append(group)
    return SparsityConfig(groups=[*groups, *later.groups])


def _layers_of(model: nn.Module, group: GroupConfig) -> list[str]:
    """Return the layers that a group targets; none if the model has changed so much since that nothing fits."""
    try:
        units = find_units(model, PATTERNS.build(group.pattern), group.target_names, group.exclude_names)
    except RecipeError:
        return []
    return [member.layer_name for unit in units for member in unit.members]
