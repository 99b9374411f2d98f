"""A plan: one group of the config, resolved against a model. It knows when its masks are due, and makes them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.sparsity import PATTERNS, SCHEDULES, SCORERS, SELECTIONS, GroupConfig, SparsityConfig
from ..errors import PatternError, RecipeError, SparsityError
from ..modeling.zero_preservation import keeps_zeros
from .masked_weight import hidden
from .patterns import Element, Pattern, Structure
from .schedules import Schedule
from .scorers import Scorer
from .selection import Selection, Uniform, WithinInputs, kept_count
from .selection.budget import Budget, Costs
from .unit import Share, Unit, find_shares

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Plan:
    """One group of the config, resolved against a model."""

    config: GroupConfig
    scorer: Scorer
    pattern: Pattern
    selection: Selection
    schedule: Schedule
    sparsity: float
    shares: list[list[Share]]
    units: list[Unit] = dataclasses.field(default_factory=list)
    met: float | None = None  # the sparsity that the masks of a scorer that regrows were made for
    suspicious: bool = False  # a gradient since the last renewal was not finite

    def sparsity_at(self, progress: float) -> float:
        """Return the scheduled sparsity; for a selection with a value, the scheduled share of that value."""
        return self.schedule(progress, self.sparsity)

    def level(self, progress: float) -> float:
        """Return the scheduled sparsity as a share of the final one."""
        return self.sparsity_at(progress) / self.sparsity if self.sparsity else 1.0

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

    def renew(self, progress: float) -> bool:
        """Make the masks for this point of training, and return whether the weights were scored for it."""
        seen = False
        sparsity, regrows = self.sparsity_at(progress), self.scorer.regrows
        # Between updates masks that are never chosen anew cost nothing.
        if not regrows or self.scorer.updates(progress) or self.met != sparsity:
            if regrows:
                scores = [unit.regrown_scores(self.scorer, i, progress) for i, unit in enumerate(self.units)]
            else:
                scores = [unit.group_scores(self.scorer) for unit in self.units]
            kept = self._select(scores, sparsity)
            for unit, groups in zip(self.units, kept, strict=True):
                if regrows:
                    unit.grow(groups)
                else:
                    unit.keep(groups)
            self.met = sparsity
            seen = True
        self.scorer.adapt(self.selection.threshold, self.level(progress))
        for unit in self.units:
            unit.watch(self.scorer, progress)
        return seen

    def _select(self, scores: list[Tensor], sparsity: float) -> list[Tensor]:
        try:
            return self.selection.select(scores, sparsity)
        except SparsityError:
            broken = [u.name for u, tensor in zip(self.units, scores, strict=True) if bool(_full(tensor).isnan().any())]
            if broken:
                raise SparsityError(_nan_message("among the scores", broken)) from None
            raise

    def check_finite(self) -> None:
        """Raise `SparsityError` if training has made NaN of weights, which the scores of this step have not seen.

        A loss of NaN makes entries of every weight NaN, so the smallest weight tells; after a gradient that was not
        finite, all are looked at.
        """
        members = [member for unit in self.units for member in unit.members]
        if not self.suspicious:
            members = [min(members, key=lambda member: member.masked.mask.numel())]
        self.suspicious = False
        broken = [member.name for member in members if bool(_full(hidden(member.module).detach()).isnan().any())]
        if broken:
            raise SparsityError(_nan_message("among the entries", broken))

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Every layer with a weight in this plan, by name."""
        return {share.name: share.layer for unit in self.shares for share in unit}

    @property
    def hidden(self) -> list[nn.Parameter]:
        """The dense weights of all units, under their masks."""
        return [hidden(member.module) for unit in self.units for member in unit.members]

    @property
    def scores(self) -> list[nn.Parameter]:
        """The learned scores of all units."""
        return [unit.masked.scores for unit in self.units if unit.masked.scores is not None]


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _nan_message(where: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
    return (
        f"there are NaN {where} of '{names[0]}'{more}, so nothing can be selected. In training, the run has diverged: "
        "lower the learning rate, or look at the loss before this step. In one-shot pruning, the weights that were "
        "loaded or their gradients on the calibration data are NaN"
    )


def make_plan(model: nn.Module, group: GroupConfig) -> Plan:
    """Resolve a group against a model.

    Raises:
        RecipeError: if a target matches nothing, or scorer and selection do not go together.
        PatternError: if the pattern does not fit a weight or a selection, or needs an architecture that is not known.
    """
    scorer, pattern = SCORERS.build(group.scorer), PATTERNS.build(group.pattern)
    own = pattern.own_selection()
    if own is not None and group.selection is not None:
        raise PatternError(
            f"pattern {pattern} has a selection of its own, the only one that suits it; leave selection "
            f"{group.selection!r} out"
        )
    chosen = SELECTIONS.build(group.selection) if group.selection is not None else None
    selection = own or chosen or scorer.own_selection() or Uniform()
    if scorer.regrows and selection.decides_sparsity:
        raise RecipeError(
            f"scorer '{scorer.name}' drops and grows weights at the scheduled sparsity, but selection "
            f"'{selection.name}' decides the sparsity itself. Use selection 'uniform' or 'global' and give a sparsity"
        )
    sparsity = group.sparsity if group.sparsity is not None else pattern.fixed_sparsity
    shares = find_shares(model, pattern, group.target_names, group.exclude_names)
    if isinstance(selection, Budget):
        selection.prepare(_costs(pattern, shares))
    # A selection with a value has no sparsity of its own: its schedule runs from 0 to all of that value.
    final = 1.0 if sparsity is None else float(sparsity)
    return Plan(group, scorer, pattern, selection, SCHEDULES.build(group.schedule), final, shares)


def _costs(pattern: Pattern, shares: list[list[Share]]) -> list[Costs]:
    """Return what the groups of each unit cost.

    Raises:
        PatternError: if removing a group makes no layer smaller.
    """
    if not isinstance(pattern, Structure):
        raise PatternError(
            "selection 'budget' counts what is left when heads, neurons or sub-blocks are cut out, but pattern "
            f"{pattern} leaves every layer as large as it is. Use pattern 'head+neuron', 'head', 'neuron' or 'layer', "
            "or ask for a sparsity"
        )
    costs = []
    for output, *inputs in shares:
        width, rows = output.layer.out_features, output.layer.in_features
        (groups,) = output.pattern.groups_shape((width, rows))
        # Three layers go into an attention, and one or two into a feed-forward part.
        kind: Literal["attention", "feed_forward"] = "attention" if len(inputs) == 3 else "feed_forward"
        costs.append(Costs(kind, width, groups, rows // groups, len(inputs)))
    return costs


def warn_of_freed_zeros(plans: list[Plan]) -> None:
    """Warn if zeros that weights have kept since an earlier pruning would train again, which few expect."""
    freed = []
    for plan in plans:
        # Masks that begin with the smallest weights cover the zeros, if they begin with as many of them.
        smallest = isinstance(plan.pattern, Element) and (plan.scorer.regrows or plan.scorer.name == "magnitude")
        for name, layer in plan.layers.items():
            if keeps_zeros(layer) and not layer.weight.is_meta:  # offloaded: attaching refuses it
                left = int(torch.count_nonzero(layer.weight))
                covered = smallest and kept_count(layer.weight.numel(), plan.sparsity_at(0.0)) <= left
                freed += [] if covered or left == layer.weight.numel() else [f"{name}.weight"]
    if freed:
        logger.warning(
            f"{len(freed)} weights (first: {freed[0]}) have zeros of an earlier pruning, and these are free to train "
            "from now on: the new masks begin with other weights than those. To go on from them, use scorer "
            "'magnitude' and pattern 'element', and let the schedule begin where they are, as initial=0.9 for 90 %"
        )


def check_disjoint(plans: list[Plan]) -> None:
    """Raise `RecipeError` if a weight is in two groups."""
    owner: dict[str, int] = {}
    for index, plan in enumerate(plans):
        for name in plan.layers:
            if name in owner:
                raise RecipeError(
                    f"'{name}' is in group {owner[name]} and in group {index}, but a weight has one mask. Exclude it "
                    "from one of them"
                )
            owner[name] = index


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
    """Return the layers that a group means; none if the model has changed so much since that nothing fits."""
    try:
        units = find_shares(model, PATTERNS.build(group.pattern), group.target_names, group.exclude_names)
    except RecipeError:
        return []
    return [share.name for unit in units for share in unit]


def check_shards(plan: Plan) -> None:
    """Raise `RecipeError` if the weights are sharded and the scores of this plan cannot be computed on shards."""
    if any(isinstance(hidden(unit.module), DTensor) for unit in plan.units):
        refuse_shards(plan)


def refuse_shards(plan: Plan) -> None:
    """Raise `RecipeError` if this plan does not work on weights that are going to be sharded."""
    if plan.scorer.observes or plan.scorer.regrows or not (plan.scorer.learned or isinstance(plan.pattern, Element)):
        raise RecipeError(
            f"scorer '{plan.scorer.name}' with pattern {plan.pattern.name} does not work on weights that fully_shard "
            "has divided: its scores need whole weights. Use scorer 'movement', or 'magnitude' with pattern 'element'"
        )
    if isinstance(plan.selection, WithinInputs | Budget):
        raise RecipeError(
            f"pattern {plan.pattern} with selection '{plan.selection.name}' does not work on weights that fully_shard "
            "has divided. Use selection 'uniform' or 'global'"
        )
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in [*plan.hidden, *plan.scores]}
    if plan.scores and len(types) > 1:
        raise RecipeError(
            f"fully_shard wants one data type, but weights and scores are {' and '.join(sorted(types))}. Give the "
            "scorer the dtype of the weights"
        )
