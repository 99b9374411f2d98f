"""Pruner: the verbs. It owns no loop and no optimizer, so the Trainer and your own accelerate loop can both use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .budget import Budget, Costs
from .config import PATTERNS, SCHEDULES, SCORERS, SELECTIONS, GroupConfig, SparsityConfig
from .errors import PatternError, RecipeError, SparsityError
from .masking import check_free, hidden
from .measuring import measure_heads, observe_batches
from .patterns import Element, Pattern, Structure
from .report import WEIGHTS_ATTRIBUTE, Summary, summarize
from .schedules import Schedule
from .scorers import Scorer
from .selection import Selection, Uniform, WithinInputs
from .units import Share, Unit, attach_unit, find_shares
from .zeros import free_zeros, keep_zeros

after_attach: list[Callable[[nn.Module, SparsityConfig], None]] = []
"""Called with every model that is given masks. The Hugging Face floor hangs itself in here to prepare saving."""


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

    def renew(self, progress: float) -> None:
        """Make the masks for this point of training."""
        sparsity, regrows = self.sparsity_at(progress), self.scorer.regrows
        # Between updates masks that are never chosen anew cost nothing.
        if not regrows or self.scorer.updates(progress) or self.met != sparsity:
            if regrows:
                scores = [unit.regrown_scores(self.scorer, i, progress) for i, unit in enumerate(self.units)]
            else:
                scores = [unit.group_scores(self.scorer) for unit in self.units]
            kept = self.selection.select(scores, sparsity)
            for unit, groups in zip(self.units, kept, strict=True):
                if regrows:
                    unit.grow(groups)
                else:
                    unit.keep(groups)
            self.met = sparsity
        self.scorer.adapt(self.selection.threshold, self.level(progress))

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Every layer with a weight in this plan, by name."""
        return {share.name: share.layer for unit in self.shares for share in unit}

    @property
    def scores(self) -> list[Tensor]:
        """The learned scores of all units, for the penalty."""
        return [unit.masked.scores for unit in self.units if unit.masked.scores is not None]


def _plan(model: nn.Module, group: GroupConfig) -> Plan:
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
    shares = find_shares(model, pattern, group.targets, group.exclude)
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


def _check_disjoint(plans: list[Plan]) -> None:
    owner: dict[str, int] = {}
    for index, plan in enumerate(plans):
        for name in plan.layers:
            if name in owner:
                raise RecipeError(
                    f"'{name}' is in group {owner[name]} and in group {index}, but a weight has one mask. Exclude it "
                    "from one of them"
                )
            owner[name] = index


def _check_shards(plan: Plan) -> None:
    """Raise `RecipeError` if the weights are sharded and the scores of this plan cannot be computed on shards."""
    if not any(isinstance(hidden(unit.module), DTensor) for unit in plan.units):
        return
    if plan.scorer.observes or plan.scorer.regrows or not (plan.scorer.learned or isinstance(plan.pattern, Element)):
        raise RecipeError(
            f"scorer '{plan.scorer.name}' with pattern {plan.pattern} does not work on weights that fully_shard has "
            "divided: its scores need whole weights. Use scorer 'movement', or 'magnitude' with pattern 'element'"
        )
    if isinstance(plan.selection, WithinInputs | Budget):
        raise RecipeError(
            f"pattern {plan.pattern} with selection '{plan.selection.name}' does not work on weights that fully_shard "
            "has divided. Use selection 'uniform' or 'global'"
        )


class Pruner:
    """Put masks on a model, renew them as training goes on, and make them permanent.

    Args:
        model: any `nn.Module` with linear layers.
        config: what is asked for.

    Raises:
        RecipeError: if a target matches nothing, a weight is in two groups, or a pattern does not fit; the model is
            then untouched.

    Example:
        >>> import torch
        >>> from hf_sparse import Pruner, SparsityConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> config = SparsityConfig(targets="*", sparsity=0.5, scorer="movement", schedule="constant")
        >>> pruner = Pruner(model, config).attach()
        >>> optimizer = torch.optim.AdamW(pruner.parameter_groups(), lr=1e-3)
        >>> pruner.step(progress=0.0)
        >>> for step in range(4):
        ...     loss = model(torch.ones(1, 8)).sum() + pruner.penalty()
        ...     loss.backward()
        ...     pruner.observe()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     pruner.step(progress=(step + 1) / 4)
        >>> _ = pruner.bake()
        >>> int((model[0].weight == 0).sum())
        32
    """

    def __init__(self, model: nn.Module, config: SparsityConfig) -> None:
        self.model = model
        self.config = config
        self.plans = [_plan(model, group) for group in config.groups]
        _check_disjoint(self.plans)
        self.attached = False

    def attach(self) -> Pruner:
        """Put a mask that keeps everything on each weight, and scores beside it where the method learns them.

        Call it before the optimizer is made and before the model is wrapped (DDP, FSDP).

        Raises:
            RecipeError: if a weight has a mask or another parametrisation, is on the meta device, or is frozen though
                the scorer needs its gradient; the model is then untouched.
        """
        for plan in self.plans:
            for name, layer in plan.layers.items():
                check_free(layer, f"{name}.weight")
                if plan.scorer.observes and not layer.weight.requires_grad:
                    raise RecipeError(
                        f"scorer '{plan.scorer.name}' looks at gradients, but '{name}.weight' is frozen "
                        "(requires_grad=False) and has none. Unfreeze it, exclude it, or use scorer 'magnitude'"
                    )
        for plan in self.plans:
            free_zeros(plan.layers.values())  # of an earlier pruning: from here on the masks decide
            weights = [layer.weight for layer in plan.layers.values()]
            shared = plan.scorer.shared_state(sum(weight.numel() for weight in weights))
            plan.units = [attach_unit(unit, plan.scorer, shared) for unit in plan.shares]
        names = {member.name for unit in self.units for member in unit.members}
        order = [f"{name}.weight" for name, _ in self.model.named_modules() if f"{name}.weight" in names]
        setattr(self.model, WEIGHTS_ATTRIBUTE, tuple(order))
        self.attached = True
        for prepare in after_attach:
            prepare(self.model, self.config)
        return self

    @property
    def units(self) -> list[Unit]:
        """All units of all groups."""
        return [unit for plan in self.plans for unit in plan.units]

    @torch.no_grad()
    def step(self, progress: float, step: int | None = None) -> None:
        """Recompute every mask for this point of training.

        Args:
            progress: fraction of training done, in [0, 1].
            step: optimizer steps done; with it, groups whose schedule says `every: n` are renewed every n steps only.

        Raises:
            RecipeError: if progress is no fraction (a step number, a percentage).
            SparsityError: before `attach`, or if there are NaN among the scores.
        """
        self._must_be_attached()
        if not 0.0 <= progress <= 1.0:
            raise RecipeError(f"progress is the fraction of training done, from 0 to 1, not {progress}")
        for plan in self.plans:
            if plan.due(progress, step):
                _check_shards(plan)
                plan.renew(progress)

    def observe(self) -> None:
        """Show this step's gradients to the scorers that look at them; call it between backward and optimizer step."""
        self._must_be_attached()
        with torch.no_grad():
            for plan in self.plans:
                if plan.scorer.observes:
                    for unit in plan.units:
                        unit.observe(plan.scorer)

    def measure(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Show data to the scorers that look at gradients or measure heads, without training; then call `step`.

        The model runs as in evaluation, and its `grad` is left alone. A plain iterator is read once, and kept in memory
        if both kinds of scorers need it.

        Args:
            batches: keyword arguments of the model, with labels; tensors on its device.

        Raises:
            SparsityError: before `attach`, if there is no batch, or the model returns no loss.
            PatternError: if heads are to be measured in a group that has none.
        """
        self._must_be_attached()
        observing = [(plan.scorer, unit) for plan in self.plans if plan.scorer.observes for unit in plan.units]
        measuring = [(plan.scorer, unit) for plan in self.plans if plan.scorer.measures for unit in plan.units]
        if observing and measuring:
            batches = list(batches)
        if observing:
            observe_batches(self.model, observing, batches)
        if measuring:
            measure_heads(self.model, measuring, batches)

    @property
    def has_penalty(self) -> bool:
        """Whether any group adds a term to the loss."""
        return any(plan.scorer.penalized for plan in self.plans)

    def penalty(self) -> Tensor:
        """Return what is to be added to the loss: a scalar, 0 for methods without a loss term."""
        self._must_be_attached()
        terms = [plan.scorer.penalty(plan.scores) for plan in self.plans if plan.scorer.penalized]
        device = next(self.model.parameters()).device
        return torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)

    def score_groups(self) -> list[dict[str, object]]:
        """Return optimizer groups for the learned scores: their learning rate, and no weight decay."""
        rates: dict[float, list[nn.Parameter]] = {}
        for plan in self.plans:
            for unit in plan.units:
                if unit.masked.scores is not None:
                    rates.setdefault(plan.scorer.learning_rate, []).append(unit.masked.scores)
        return [{"params": scores, "lr": rate, "weight_decay": 0.0} for rate, scores in rates.items()]

    def parameter_groups(self) -> list[dict[str, object]]:
        """Return optimizer groups for the whole model: its own parameters, then `score_groups`."""
        groups = self.score_groups()
        learned = {id(parameter) for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
        own = [parameter for parameter in self.model.parameters() if id(parameter) not in learned]
        return [{"params": own}, *groups]

    @torch.no_grad()
    def finish(self) -> None:
        """Check that what was asked for was reached.

        Raises:
            SparsityError: before `attach`, or if a group is less sparse than asked: the run ended before its schedule.
        """
        self._must_be_attached()
        for plan in self.plans:
            if plan.selection.decides_sparsity:
                continue
            masks = [unit.kept() for unit in plan.units]
            groups = sum(mask.numel() for mask in masks)
            kept = sum(int(torch.count_nonzero(mask)) for mask in masks)
            # Each unit may keep one more than its share; where it has but one group, units compete instead.
            allowed = max(1, int((1.0 - plan.sparsity) * groups + 1e-6)) + sum(mask.numel() > 1 for mask in masks)
            if kept > allowed:
                raise SparsityError(
                    f"asked for sparsity {plan.sparsity:g}, but the masks are at {1 - kept / groups:.4f}: they were "
                    "not renewed at the end of the schedule. Call step(progress=1.0) before bake()"
                )

    @torch.no_grad()
    def bake(self) -> nn.Module:
        """Make the zeros part of the weights, take masks and scores off, and return the model, plain again.

        In training that follows, the zeros stay zero, with an optimizer that is new: one that has trained these weights
        before remembers their momentum and moves them once more.
        """
        self._must_be_attached()
        if any(isinstance(hidden(unit.module), DTensor) for unit in self.units):
            raise SparsityError(
                "bake() cannot take masks off weights that fully_shard has taken over. Take the whole state dict "
                "(full_tensor() of each entry): its 'weight' entries are masked and load into a plain model"
            )
        modules = [member.module for unit in self.units for member in unit.members]
        for unit in self.units:
            unit.bake()
        keep_zeros(modules)
        for plan in self.plans:
            plan.units = []
        self.attached = False
        return self.model

    def summary(self) -> Summary:
        """Return how sparse the model is now, per weight and in total."""
        return summarize(self.model)

    def logs(self) -> dict[str, float]:
        """Return numbers for a training log: sparsity in total and per group, thresholds, penalty, norms of scores.

        Raises:
            SparsityError: before `attach`.
        """
        self._must_be_attached()
        out: dict[str, float] = {}
        zeros = total = 0
        for index, plan in enumerate(self.plans):
            tail = f"_{index}" if len(self.plans) > 1 else ""
            masks = [member.masked.mask for unit in plan.units for member in unit.members]
            size = sum(mask.numel() for mask in masks)
            removed = size - sum(int(torch.count_nonzero(mask)) for mask in masks)
            zeros, total = zeros + removed, total + size
            if tail:
                out[f"sparsity{tail}"] = removed / size
            for key, value in (plan.scorer.logs(plan.selection.threshold) | plan.selection.logs()).items():
                out[key + tail] = value
            if plan.scores:
                squares = sum(float(score.detach().double().square().sum()) for score in plan.scores)
                out[f"score_norm{tail}"] = squares**0.5
            if plan.scorer.penalized:
                with torch.no_grad():
                    out[f"penalty{tail}"] = float(plan.scorer.penalty(plan.scores))
        return {"sparsity": zeros / total, **out}

    def _must_be_attached(self) -> None:
        if not self.attached:
            raise SparsityError("this Pruner has no masks on its model: call attach() first (bake() takes them off)")
