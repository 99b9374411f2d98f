"""Pruner: the verbs. It owns no loop and no optimizer, so the Trainer and your own accelerate loop can both use it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.sparsity import SparsityConfig
from ..errors import RecipeError, SparsityError
from ..modeling.layer_matching import warn_of_missed
from ..modeling.model_state import mark_sparse_weights
from ..modeling.zero_preservation import free_zeros, keep_zeros, keeps_zeros
from .attached_checks import Presence, SteppedOptimizers
from .calibration import measure_heads, observe_batches
from .group import check_disjoint, check_shards, make_plan
from .masked_weight import check_free, hidden
from .patterns import Structure
from .score_warmup import warm_up
from .summary import Summary, summarize
from .unit import Unit, attach_unit

logger = logging.getLogger(__name__)

after_attach: list[Callable[[nn.Module, SparsityConfig], None]] = []
"""Called with every model that is given masks. The Hugging Face floor hangs itself in here to prepare saving."""


class Pruner:
    """Put masks on a model, renew them as training goes on, and make them permanent.

    Args:
        model: any `nn.Module` with linear layers.
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
        self.model = model
        self.config = SparsityConfig.of(config)
        self.plans = [make_plan(model, group) for group in self.config.groups]
        check_disjoint(self.plans)
        self.attached = False
        self._kept_zeros: list[nn.Linear] = []  # layers that kept zeros of an earlier pruning before `attach`
        self.progress = 0.0  # of the last `step`

    def attach(self) -> Pruner:
        """Put a mask that keeps everything on each weight, and scores beside it where the method learns them.

        Call it before the optimizer is made and before the model is wrapped (DDP, FSDP).

        Raises:
            RecipeError: if a weight has a mask or another parametrisation, is on the meta device, or is frozen though
                the scorer needs its gradient; the model is then untouched.
        """
        self.put_masks()
        self.mark()
        frozen = [
            member.name
            for plan in self.plans
            if not plan.scorer.learned
            for unit in plan.units
            for member in unit.members
            if not hidden(member.module).requires_grad
        ]
        if frozen:
            logger.warning(
                f"{len(frozen)} weights (first: {frozen[0]}) are frozen (requires_grad=False). They will be pruned, "
                "but the values that are left will not adapt to it. Unfreeze them, or exclude them from pruning"
            )
        return self

    def put_masks(self) -> None:
        """Put the masks on, and change nothing else of the model; `attach` without `mark`."""
        for plan in self.plans:
            for name, layer in plan.layers.items():
                check_free(layer, f"{name}.weight")
                if plan.scorer.observes and not layer.weight.requires_grad:
                    raise RecipeError(
                        f"scorer '{plan.scorer.name}' looks at gradients, but '{name}.weight' is frozen "
                        "(requires_grad=False) and has none. Unfreeze it, exclude it, or use scorer 'magnitude'"
                    )
        layers = [layer for plan in self.plans for layer in plan.layers.values()]
        self._kept_zeros = [layer for layer in layers if keeps_zeros(layer)]
        free_zeros(layers)  # of an earlier pruning: from here on the masks decide
        for plan in self.plans:
            weights = [layer.weight for layer in plan.layers.values()]
            shared = plan.scorer.shared_state(sum(weight.numel() for weight in weights))
            plan.units = [attach_unit(unit, plan.scorer, shared) for unit in plan.shares]
        self._presence = Presence(self.model, [member for unit in self.units for member in unit.members])
        learned = [plan for plan in self.plans if plan.scores]
        self._optimizers = SteppedOptimizers([weight for plan in learned for weight in plan.hidden])
        self.attached = True

    def mark(self) -> None:
        """Let the model remember which weights are sparse, beside those of an earlier pruning, and be saved packed."""
        names = [name for plan in self.plans for name in plan.layers]
        mark_sparse_weights(self.model, [f"{name}.weight" for name in names])
        if any(plan.config.target_names is None and not isinstance(plan.pattern, Structure) for plan in self.plans):
            warn_of_missed(self.model, names)
        for prepare in after_attach:
            prepare(self.model, self.config)

    @torch.no_grad()
    def detach(self) -> nn.Module:
        """Take the masks off without making their zeros permanent, and return the model with its dense weights.

        Weights that an earlier pruning made sparse keep their zeros again.
        """
        self._must_be_attached()
        for unit in self.units:
            unit.keep_all()
            unit.bake()
        keep_zeros(self._kept_zeros)
        self._optimizers.close()
        for plan in self.plans:
            plan.units = []
        self.attached = False
        return self.model

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
        self.progress = progress
        self._presence.check()
        self._optimizers.check([scores for plan in self.plans for scores in plan.scores])
        for plan in self.plans:
            scored = False
            if plan.due(progress, step):
                check_shards(plan)
                scored = plan.renew(progress)
            if not scored or plan.suspicious:
                plan.check_finite()

    def observe(self, scale: float = 1.0) -> None:
        """Show this step's gradients to the scorers that look at them; call it between backward and optimizer step.

        Args:
            scale: what the loss was multiplied with before `backward`, as in `GradScaler.get_scale()`. The gradients
                seen here are not those of parameters, so no `unscale_` reaches them.
        """
        self._must_be_attached()
        with torch.no_grad():
            for plan in self.plans:
                if plan.scorer.observes:
                    finite = [unit.observe(plan.scorer, scale) for unit in plan.units]
                    plan.suspicious = plan.suspicious or not all(finite)

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
        """Return optimizer groups for the learned scores: their learning rate, and no weight decay.

        Scorers that warm up have groups of their own; `warm_up` changes their rate.
        """
        rates: dict[tuple[float, float], list[nn.Parameter]] = {}
        for plan in self.plans:
            for scores in plan.scores:
                rates.setdefault((plan.scorer.learning_rate, plan.scorer.warmup), []).append(scores)
        return [{"params": scores, "lr": rate, "weight_decay": 0.0} for (rate, _), scores in rates.items()]

    def warm_up(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the scores of scorers with a `warmup` warm up in this optimizer, along the progress told to `step`.

        Args:
            optimizer: made of `parameter_groups` or `score_groups`; a scheduler may change their rates as it likes.
        """
        if any(plan.scorer.warmup for plan in self.plans):
            warm_up(optimizer, self._warmth)

    def _warmth(self) -> dict[Tensor, float]:
        warming = [plan for plan in self.plans if plan.scorer.warmup > self.progress]
        return {scores: self.progress / plan.scorer.warmup for plan in warming for scores in plan.scores}

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
        self._presence.check()
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

        In training that follows, the zeros stay zero. Under `fully_shard` masks and scores stay where they are, but
        have no effect on anything any more, and state dicts are those of the plain model.
        """
        self._must_be_attached()
        modules = [member.module for unit in self.units for member in unit.members]
        for unit in self.units:
            unit.bake()
        keep_zeros(modules)
        self._optimizers.close()
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
