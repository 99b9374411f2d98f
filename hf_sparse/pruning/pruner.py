"""Pruner: the verbs. It owns no loop and no optimizer, so the Trainer and your own accelerate loop can both use it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.sparsity import SparsityConfig
from ..errors import RecipeError, SparsityError
from ..modeling.integration import integration_of
from ..modeling.layer_kinds import Slot
from ..modeling.layer_matching import warn_of_missed
from ..modeling.model_state import check_model, mark_sparse_weights
from ..modeling.ownership import count_owners
from ..modeling.zero_preservation import free_zeros, keep_zeros, keeps_zeros
from ..utils.text import shorten
from ..utils.validation import check_batches, check_integer, is_number
from .attached_checks import Presence, SteppedOptimizers
from .calibration import measure_heads, observe_batches
from .compressions import bind_forms
from .group import bind_group
from .group_checks import check_disjoint, check_shards, warn_of_rounding
from .masks_beside import are_under, in_memory, put_beside, refuse_partitioned
from .patterns import Structure
from .score_warmup import warm_up
from .scorers import HeadImportance
from .sharded_first import follow, movable
from .summary import Summary, summarize
from .tied_masks import attach_tied, free_tied, sharers
from .training_logs import training_logs
from .unit import Unit

logger = logging.getLogger(__name__)


class Pruner:
    """Put masks on a model, renew them as training goes on, and make them permanent.

    Args:
        model: any `nn.Module` with linear layers, convolutions or stacked experts.
        config: `SparsityConfig`, or a mapping with its keys.

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

    def __init__(self, model: nn.Module, config: SparsityConfig | Mapping[str, Any]) -> None:
        check_model(model)
        refuse_partitioned(model)
        self.model = model
        self.config = SparsityConfig.of(config)
        self.groups = [bind_group(model, group) for group in self.config.groups if group.prunes]
        self.forms = bind_forms(model, self.config.groups)
        check_disjoint([*self.groups, *self.forms])
        self.attached = False
        self._kept_zeros: list[Slot] = []  # weights that kept zeros of an earlier pruning before `attach`
        self._tied: list[nn.Module] = []  # modules that share a masked weight
        self.progress = 0.0  # of the last `step`

    def attach(self) -> Pruner:
        """Put a mask that keeps everything on each weight, and scores beside it where the method learns them.

        Call it before the optimizer is made and before the model is wrapped (DDP); before or after `fully_shard`.

        Raises:
            RecipeError: if a weight has a mask or another parametrisation, is on the meta device, or is frozen though
                the scorer needs its gradient, or if a group can be pruned in one shot only; the model is then
                untouched.
        """
        for group in self.groups:
            group.check_renewable()
        for form in self.forms:
            form.check_renewable()
        self.put_masks()
        self.mark()
        frozen = [
            member.name
            for group in self.groups
            if group.scorer.source != "training"
            for member in group.members
            if not member.hidden.requires_grad
        ]
        if frozen:
            logger.warning(
                f"{len(frozen)} weights (first: {frozen[0]}) are frozen (requires_grad=False). They will be pruned, "
                "but the values that are left will not adapt to it. Unfreeze them, or exclude them from pruning"
            )
        return self

    def put_masks(self) -> None:
        """Put the masks on, and change nothing else of the model; `attach` without `mark`."""
        sharded = movable(self.model)
        for group in self.groups:
            group.check_free(sharded)
        members = [member for group in self.groups for member in group.members]
        owners = count_owners(self.model)
        shared = [member for member in members if owners[id(member.slot.parameter)] > 1]
        tied = [(member, sharers(self.model, member.module, member.name)) for member in shared]
        slots = list(dict.fromkeys(slot for unit in self.units for slot in unit.slots))
        self._kept_zeros = [slot for slot in slots if keeps_zeros(slot)]
        free_zeros(slots)  # of an earlier pruning: from here on the masks decide
        for group in self.groups:
            group.attach()
        for member, others in tied:
            for other in others:
                attach_tied(other, member.module, member.masked)
                self._tied.append(other)
        follow(self.model)
        self._presence = Presence(self.model, members)
        learned = [group for group in self.groups if group.scores]
        self._optimizers = SteppedOptimizers([weight for group in learned for weight in group.hidden])
        self.attached = True

    def move_beside(self) -> None:
        """Keep masks beside the weights, for DeepSpeed ZeRO-3: `step` does it; a resume needs it before it loads."""
        self._presence = Presence(self.model, put_beside(self.groups, self._tied))

    def mark(self) -> None:
        """Let the model remember which weights are sparse, beside those of an earlier pruning, and be saved packed."""
        names = [name for unit in self.units for name in unit.names]
        mark_sparse_weights(self.model, dict.fromkeys(names))
        if any(group.config.target_names is None and not isinstance(group.pattern, Structure) for group in self.groups):
            warn_of_missed(self.model, [member.layer_name for unit in self.units for member in unit.members])
        warn_of_rounding(self.groups)
        for form in self.forms:
            form.replace(self.model)
        integration_of(self.model).after_attach(self.model, self.config)

    @torch.no_grad()
    def detach(self) -> nn.Module:
        """Take the masks off without making their zeros permanent, and return the model with its dense weights.

        Weights that an earlier pruning made sparse keep their zeros again, and layers that got another form keep that.
        """
        self._must_be_attached()
        for group in self.groups:
            for unit in group.units:
                unit.keep_all()
        self._take_masks_off()
        keep_zeros(in_memory(self._kept_zeros))
        self._optimizers.close()
        self.attached = False
        return self.model

    @property
    def units(self) -> list[Unit]:
        """All units of all groups."""
        return [unit for group in self.groups for unit in group.units]

    @torch.no_grad()
    def step(self, progress: float, step: int | None = None) -> None:
        """Recompute every mask for this point of training.

        Args:
            progress: fraction of training done, in [0, 1].
            step: optimizer steps done; with it, groups whose schedule has `every: n` are renewed every n steps only.

        Raises:
            RecipeError: if progress is not a number in [0, 1] (a step number, a percentage).
            SparsityError: before `attach`, or if there are NaN among the scores.
        """
        self._must_be_attached()
        if not is_number(progress) or not 0.0 <= progress <= 1.0:
            raise RecipeError(
                f"`progress` must be a number in [0, 1], the fraction of training done, got {shorten(progress)}"
            )
        if step is not None:
            check_integer("step", step, "[0, inf)")
        self.progress = progress
        if are_under(self.groups):
            self.move_beside()
        self._presence.check()
        self._optimizers.check([scores for group in self.groups for scores in group.scores])
        for group in self.groups:
            scored = False
            if group.due(progress, step):
                check_shards(group)
                scored = group.renew(progress)
            if not scored or group.suspicious:
                group.check_finite()

    def observe(self, scale: float = 1.0) -> None:
        """Show this step's gradients to the scorers that look at them; call it between backward and optimizer step.

        Args:
            scale: what the loss was multiplied with before `backward`, as in `GradScaler.get_scale()`. The gradients
                seen here are not those of parameters, so no `unscale_` reaches them.
        """
        self._must_be_attached()
        with torch.no_grad():
            for group in self.groups:
                group.observe(scale)

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
        check_batches(batches)
        pairs = [(group.scorer, unit) for group in self.groups for unit in group.units]
        observing = [(scorer, unit) for scorer, unit in pairs if scorer.source == "gradients"]
        measuring = [(scorer, unit) for scorer, unit in pairs if isinstance(scorer, HeadImportance)]
        if observing and measuring:
            batches = list(batches)
        if observing:
            observe_batches(self.model, observing, batches)
        if measuring:
            measure_heads(self.model, measuring, batches)

    @property
    def has_penalty(self) -> bool:
        """Whether any group adds a term to the loss."""
        return any(group.scorer.penalized for group in self.groups)

    def penalty(self) -> Tensor:
        """Return what is to be added to the loss: a scalar, 0 for methods without a loss term."""
        self._must_be_attached()
        terms = [group.scorer.penalty(group.scores) for group in self.groups if group.scorer.penalized]
        device = next(self.model.parameters()).device
        return torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)

    def score_groups(self) -> list[dict[str, object]]:
        """Return optimizer groups for the learned scores: their learning rate, and no weight decay.

        Scorers that warm up have groups of their own; `warm_up` changes their rate.
        """
        rates: dict[tuple[float, float], list[nn.Parameter]] = {}
        for group in self.groups:
            for scores in group.scores:
                rates.setdefault((group.scorer.learning_rate, group.scorer.warmup), []).append(scores)
        return [{"params": scores, "lr": rate, "weight_decay": 0.0} for (rate, _), scores in rates.items()]

    def warm_up(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the scores of scorers with a `warmup` warm up in this optimizer, along the progress given to `step`.

        Args:
            optimizer: made of `parameter_groups` or `score_groups`; a scheduler may change their rates as it likes.
        """
        if any(group.scorer.warmup for group in self.groups):
            warm_up(optimizer, self._warmth)

    def _warmth(self) -> dict[Tensor, float]:
        warming = [group for group in self.groups if group.scorer.warmup > self.progress]
        return {scores: self.progress / group.scorer.warmup for group in warming for scores in group.scores}

    def parameter_groups(self) -> list[dict[str, object]]:
        """Return optimizer groups for the whole model: the parameters of the model, then `score_groups`."""
        groups = self.score_groups()
        learned = {id(parameter) for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in learned]
        return [{"params": others}, *groups]

    @torch.no_grad()
    def finish(self) -> None:
        """Check that the requested sparsity was reached.

        Raises:
            SparsityError: before `attach`, or if a group is less sparse than requested: the run ended before its
                schedule.
        """
        self._must_be_attached()
        self._presence.check()
        for group in self.groups:
            if group.selection.decides_sparsity:
                continue
            groups = sum(unit.groups for unit in group.units)
            kept = sum(unit.count_kept() for unit in group.units)
            # Each unit may keep one more than its share; where it has but one group, units compete instead.
            allowed = max(1, int((1.0 - group.sparsity) * groups + 1e-6)) + sum(u.groups > 1 for u in group.units)
            if kept > allowed:
                raise SparsityError(
                    f"sparsity {group.sparsity:g} was requested, but the masks are at {1 - kept / groups:.4f}: they "
                    "were not renewed at the end of the schedule. Call step(progress=1.0) before bake()"
                )

    @torch.no_grad()
    def bake(self) -> nn.Module:
        """Make the zeros part of the weights, take masks and scores off, and return the model, plain again.

        In training that follows, the zeros stay zero. Under `fully_shard` masks and scores stay where they are, but
        have no effect on anything any more, and state dicts are those of the plain model.
        """
        self._must_be_attached()
        self._take_masks_off()
        keep_zeros(in_memory(dict.fromkeys(slot for unit in self.units for slot in unit.slots)))
        self._optimizers.close()
        self.attached = False
        return self.model

    def _take_masks_off(self) -> None:
        while self._tied:
            free_tied(self._tied.pop())
        for group in self.groups:
            group.bake()

    def summary(self) -> Summary:
        """Return how sparse the model is now, per weight and in total."""
        return summarize(self.model)

    def logs(self) -> dict[str, float]:
        """Return numbers for a training log: sparsity in total and per group, thresholds, penalty, norms of scores.

        Raises:
            SparsityError: before `attach`.
        """
        self._must_be_attached()
        return training_logs(self.groups)

    # The same methods under the names that torch and accelerate have for such things.
    verify_sparsity, finalize, calibrate = finish, bake, measure
    param_groups, score_param_groups, accumulate_gradients = parameter_groups, score_groups, observe

    def _must_be_attached(self) -> None:
        if not self.attached:
            raise SparsityError("this Pruner has no masks on its model: call attach() first (bake() takes them off)")
