"""SparsityCallback: prune while the Hugging Face Trainer fine-tunes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from ...config.distillation import DistillationConfig
from ...config.sparsity import SparsityConfig
from ...errors import RecipeError, SparsityError
from ...pruning.group import Plan, warn_of_freed_zeros
from ...pruning.mask_sync import check_same_masks
from ...pruning.pruner import Pruner
from ..hub.push import guard_trainer
from .fsdp import announce_fsdp, check_fsdp
from .loss_hook import LossTerms
from .optimizer import announce_optimizer, check_optimizer, group_scores
from .teacher import check_cache, make_distiller

logger = logging.get_logger(__name__)

SHORT_RAMP = 1000
"""Learned scores start from nothing. With the ramp over before so many steps, movement was at chance in our trials."""


class SparsityCallback(TrainerCallback):
    """Make the model of a Trainer sparse while it is fine-tuned.

    Masks are put on when the Trainer is made, renewed after every optimizer step, and made permanent when training
    ends; from then on `save_model` and `save_pretrained` write packed weights. Checkpoints written on the way load with
    `from_pretrained` (masked) and resume. `load_best_model_at_end` chooses among checkpoints at the final sparsity
    only.

    Args:
        config: what is asked for, a `SparsityConfig` or a mapping with its keys.
        teacher: what to learn from beside the labels: "self" for a frozen copy of the model as it is before pruning, a
            folder or Hub name, or a module. None = nothing, unless `distillation` is given.
        distillation: how, a `DistillationConfig` or a mapping with its keys.
        check_masks_every: optimizer steps between two proofs that all processes hold the same masks; 0 = never.

    Raises:
        RecipeError: before the first step, if the config does not fit the model, the training arguments or the number
            of steps.

    Example:
        >>> from hf_sparse import SparsityCallback, SparsityConfig
        >>> callback = SparsityCallback(SparsityConfig(sparsity=0.9, scorer="movement"))
        >>> # trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    """

    def __init__(
        self,
        config: SparsityConfig | Mapping[str, Any],
        teacher: str | nn.Module | None = None,
        distillation: DistillationConfig | Mapping[str, Any] | None = None,
        check_masks_every: int = 100,
    ) -> None:
        if isinstance(check_masks_every, bool) or not isinstance(check_masks_every, int) or check_masks_every < 0:
            raise RecipeError(f"check_masks_every is a whole number of steps from 0 on, not {check_masks_every!r}")
        self.check_masks_every = check_masks_every
        self.config = config if isinstance(config, SparsityConfig) else SparsityConfig.from_dict(config)
        self.distillation = _distillation(teacher, distillation)
        self.pruner: Pruner | None = None
        self._teacher = teacher if isinstance(teacher, nn.Module) else None
        self._model: nn.Module | None = None
        self._terms: LossTerms | None = None
        self._finished = False
        announce_optimizer()
        announce_fsdp()

    # -- before the first step ---------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the masks on: before the optimizer, before the wrap for several processes, before a resume loads."""
        self._attach(kwargs["model"], args)

    def before_optimizer(self, trainer: Trainer) -> None:
        """Put the masks on a model that is new since (`model_init`, or a callback added later)."""
        if self._finished and trainer.model is self._model:
            raise RecipeError(
                "this SparsityCallback has finished its run and its masks are permanent. To prune the model further, "
                "make a new Trainer with a new SparsityCallback"
            )
        self._attach(trainer.model, trainer.args)
        if trainer.is_deepspeed_enabled:
            raise RecipeError(
                "SparsityCallback does not work with DeepSpeed (ZeRO-1, 2 or 3): its engine flattens and divides the "
                "parameters and makes its own optimizer, and masks on them were never tried. Use DDP (torchrun) instead"
            )
        if trainer.args.n_gpu > 1:
            raise RecipeError(
                "SparsityCallback does not work with nn.DataParallel; start one process per GPU (torchrun)"
            )
        assert self.pruner is not None
        check_fsdp(trainer, self.pruner)
        guard_trainer(trainer)
        assert self._terms is not None
        self._terms.refuse_if(trainer.compute_loss_func is not None, "compute_loss_func replaces the model's own loss")
        if self._terms.distiller is not None:
            check_cache(self._terms.distiller, trainer)

    def after_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Give learned scores their parameter group, and speak before the loggers do."""
        assert self.pruner is not None
        if group_scores(optimizer, self.pruner):
            self.pruner.warm_up(optimizer)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)  # what `on_log` adds is then seen by TensorBoard, Weights & Biases and all others

    def _attach(self, model: Any, args: TrainingArguments) -> None:
        if model is self._model:
            return
        check_optimizer(str(getattr(args.optim, "value", args.optim)))
        pruner = Pruner(model, self.config)
        measuring = next((plan.scorer.name for plan in pruner.plans if plan.scorer.measures), None)
        if measuring is not None:
            raise RecipeError(
                f"scorer '{measuring}' measures a model on data before it is pruned, and never in training. Prune with "
                "sparsify(model, config, batches) or `hf-sparse prune --data`, then fine-tune; or use 'taylor' here"
            )
        # The teacher first: "self" is a copy of the model without masks.
        distiller = make_distiller(model, self.distillation, self._teacher) if self.distillation else None
        terms = LossTerms(model, pruner, distiller)
        warn_of_freed_zeros(pruner.plans)
        try:
            smoothing = args.label_smoothing_factor
            terms.refuse_if(smoothing, f"label_smoothing_factor={smoothing} replaces the model's own loss")
            pruner.attach()
        except SparsityError:
            terms.remove()
            raise
        if self._terms is not None:
            self._terms.remove()
        self.pruner, self._model, self._terms, self._finished = pruner, model, terms, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the schedules against the real number of steps, and make the first masks."""
        pruner = self._pruner(kwargs.get("model"))
        self._check_scores_are_trained(kwargs.get("optimizer"), pruner)
        for plan in pruner.plans:
            _check_schedule(plan, state.max_steps)
        if args.load_best_model_at_end:
            _check_best_model(pruner, args, state)
        assert self._terms is not None
        self._terms.count_batches(args)
        pruner.progress = state.global_step / state.max_steps
        if state.global_step == 0:  # a resumed run has its masks from the checkpoint
            pruner.step(0.0, step=0)
        self._forget_early_best(state)

    def _check_scores_are_trained(self, optimizer: Any, pruner: Pruner) -> None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [u.name for u in pruner.units if u.masked.scores is not None and id(u.masked.scores) not in trained]
        if missing:
            raise RecipeError(
                f"the movement scores of {len(missing)} weights (first: {missing[0]}) are not in the optimizer. A "
                "Trainer that overrides create_optimizer has to call super().create_optimizer()"
            )

    # -- during training ---------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a best checkpoint that is not at the final sparsity."""
        self._forget_early_best(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the gradients to the scorers that look at them."""
        pruner = self._pruner(kwargs.get("model"))
        # accelerate's, in fp16 alone; it has unscaled the gradients of parameters by now, and changes after the step.
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        pruner.observe(1.0 if scaler is None else scaler.get_scale())
        assert self._terms is not None
        self._terms.check_trained()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Renew the masks for the next step, for evaluation and for the checkpoint of this one."""
        pruner = self._pruner(kwargs.get("model"))
        pruner.step(state.global_step / state.max_steps, step=state.global_step)
        last = state.global_step == state.max_steps
        if self.check_masks_every and (last or state.global_step % self.check_masks_every == 0):
            check_same_masks((unit.masked.mask for unit in pruner.units), f"step {state.global_step}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add sparsity, threshold, penalty and norms to what the Trainer logs."""
        logs = kwargs.get("logs")
        if self.pruner is None or not self.pruner.attached or not logs:
            return
        if "loss" in logs:
            own = self.pruner.logs() | (self._terms.logs() if self._terms is not None else {})
        elif any(key.startswith("eval_") for key in logs):
            own = {"eval_sparsity": self.pruner.logs()["sparsity"]}
        else:
            return
        logs.update(own)
        if state.log_history:
            state.log_history[-1].update(own)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget a best checkpoint that is not at the final sparsity."""
        self._forget_early_best(state)

    def _forget_early_best(self, state: TrainerState) -> None:
        if self.pruner is None or not state.max_steps:
            return
        progress = state.global_step / state.max_steps
        if not all(plan.schedule.reached(progress) for plan in self.pruner.plans):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    # -- after the last step -----------------------------------------------------------------------------------------

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the zeros permanent and take masks and scores off."""
        pruner = self._pruner(kwargs.get("model"))
        progress = state.global_step / state.max_steps
        if all(plan.schedule.reached(progress) for plan in pruner.plans):
            pruner.finish()
        else:
            logger.warning(
                f"training was stopped at step {state.global_step} of {state.max_steps}, before the schedule reached "
                f"the sparsity that was asked; the model is at {pruner.logs()['sparsity']:.4f}"
            )
        pruner.bake()
        if self._terms is not None:
            self._terms.remove()
        self._finished = True

    def _pruner(self, model: nn.Module | None) -> Pruner:
        if self.pruner is None or not self.pruner.attached:
            raise RecipeError("SparsityCallback has no masks on the model: give it to the Trainer when you make it")
        return self.pruner


def _distillation(
    teacher: str | nn.Module | None, distillation: DistillationConfig | Mapping[str, Any] | None
) -> DistillationConfig | None:
    """Return what is asked of a teacher, or None if none is wanted."""
    if distillation is None and teacher is None:
        return None
    made = distillation if isinstance(distillation, DistillationConfig) else None
    if made is None:
        made = DistillationConfig.from_dict(distillation or {})  # type: ignore[arg-type]
    return dataclasses.replace(made, teacher=teacher) if isinstance(teacher, str) else made


def _check_schedule(plan: Plan, steps: int) -> None:
    """Raise `RecipeError` if the schedule cannot be followed in this many steps; warn where learning will suffer."""
    schedule = plan.schedule
    ramp = int(schedule.end * steps) - int(schedule.begin * steps)
    if schedule.end > schedule.begin and ramp < 1:
        raise RecipeError(
            f"schedule '{schedule.name}' rises from {schedule.begin:g} to {schedule.end:g} of the training, which is "
            f"less than one of its {steps} steps. Train longer, widen the ramp, or use schedule 'constant'"
        )
    if schedule.end > schedule.begin and schedule.every > ramp:  # without a ramp there is none to jump over
        raise RecipeError(
            f"schedule '{schedule.name}' renews the masks every {schedule.every} steps, but its ramp has {ramp} of the "
            f"{steps} steps of this training, so it would be jumped over. Lower 'every'"
        )
    plan.scorer.check_steps(schedule.every, steps)
    last = math.ceil(schedule.end * steps)
    if plan.scorer.learned and plan.sparsity > 0 and last < SHORT_RAMP:
        logger.warning(
            f"scorer '{plan.scorer.name}' learns its scores from zero, and this schedule ends its ramp at step {last} "
            f"of {steps}. With fewer than about {SHORT_RAMP} steps the scores are mostly noise at high sparsity and "
            "accuracy collapses; train longer, or use scorer 'magnitude'"
        )


def _check_best_model(pruner: Pruner, args: TrainingArguments, state: TrainerState) -> None:
    """Raise `RecipeError` if no evaluation happens at the final sparsity, so that no best model could be chosen."""
    end = max(plan.schedule.end for plan in pruner.plans)
    by_steps = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps"
    # transformers evaluates after the very last step whatever the interval is, but never before eval_delay.
    if args.eval_delay > (state.max_steps if by_steps else state.num_train_epochs):
        raise RecipeError(
            f"load_best_model_at_end needs an evaluation at the final sparsity, which holds from step "
            f"{math.ceil(end * state.max_steps)} of {state.max_steps} on, but eval_delay={args.eval_delay} puts the "
            "first one behind the end of training. Lower eval_delay"
        )
