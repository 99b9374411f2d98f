"""SparsityCallback: prune while the Hugging Face Trainer fine-tunes."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from ...config.distillation import DistillationConfig
from ...config.resolve import resolved
from ...config.sparsity import SparsityConfig
from ...errors import RecipeError, SparsityError
from ...pruning.group_checks import warn_of_freed_zeros
from ...pruning.mask_sync import check_same_masks
from ...pruning.pruner import Pruner
from ..embedding.wrapper import is_wrapper
from ..hub.push import guard_trainer
from .checkpoint import note_best_checkpoint
from .data_record import data_facts
from .deepspeed import check_deepspeed
from .fsdp import check_fsdp
from .log_first import LogsFirst
from .loss_hook import LossTerms
from .mask_owner import release, remove_masks, set_owner, take_over
from .optimizer import check_optimizer, group_scores
from .resume import guard_checkpoints
from .schedule_check import check_best_model, check_schedule
from .sparsity_record import check_sparsity_record, record_sparsity
from .teacher import check_cache, make_distiller
from .wrapper_loss import WrapperLossTerms

logger = logging.get_logger(__name__)


class Phase(enum.Enum):
    """Where a `SparsityCallback` is in its life."""

    NEW = "new"
    ATTACHED = "attached"
    FINISHED = "finished"
    REPLACED = "replaced"


class SparsityCallback(LogsFirst):
    """Make the model of a Trainer sparse while it is fine-tuned.

    Masks are put on when the Trainer is made, renewed after every optimizer step, and made permanent when training
    ends; from then on `save_model` and `save_pretrained` write packed weights. Checkpoints written on the way load with
    `from_pretrained` (masked) and resume. `load_best_model_at_end` chooses among checkpoints at the final sparsity
    only. A new Trainer with a new callback on the same model starts over: masks of an earlier callback that has not
    finished are taken off.

    Args:
        config: a `SparsityConfig` or a mapping with its keys.
        teacher: "self" for a frozen copy of the model as it is before pruning, a folder or Hub name, or a module.
            None = no distillation, unless `distillation` is given.
        distillation: a `DistillationConfig` or a mapping with its keys.
        check_masks_every: optimizer steps between two checks that all processes hold the same masks; 0 = never.
        allow: keys of `config` that may differ from those of the checkpoint that training is resumed from, as in
            `["sparsity", "schedule"]`, and "data" for the training data. Any other difference is an error.

    Raises:
        RecipeError: before the first step, if the config does not fit the model, the training arguments or the number
            of steps.
        CheckpointError: before a resume, if the checkpoint was made with another config or other training data.

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
        allow: Sequence[str] = (),
    ) -> None:
        if isinstance(check_masks_every, bool) or not isinstance(check_masks_every, int) or check_masks_every < 0:
            raise RecipeError(f"`check_masks_every` must be an integer in [0, inf), got {check_masks_every!r}")
        self.check_masks_every = check_masks_every
        self.config = SparsityConfig.of(config)
        self.distillation = _distillation(teacher, distillation)
        self.allow = (allow,) if isinstance(allow, str) else tuple(allow)
        self.pruner: Pruner | None = None
        self.phase = Phase.NEW
        self._teacher = teacher if isinstance(teacher, nn.Module) else None
        self._terms: LossTerms | None = None
        self._data: dict[str, Any] = {}
        self._resumed_at = 0.0
        self._flattened: bool | None = None  # whether the optimizer has other tensors than parameters; None = not made

    # -- before the first step ---------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the masks on: before the optimizer, before the wrap for several processes, before a resume loads."""
        self._attach(kwargs["model"], args)

    def before_resume(self, trainer: Trainer, folder: Path) -> None:
        """Compare the config of a checkpoint with this one.

        Raises:
            CheckpointError: for a difference that `allow` does not name; the message lists each.
        """
        check_sparsity_record(trainer, folder, resolved(self.config), self.allow)
        guard_checkpoints(trainer)

    def before_optimizer(self, trainer: Trainer) -> None:
        """Put the masks on a model that is new since (`model_init`, or a callback added later)."""
        callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, SparsityCallback)]
        if len(callbacks) > 1:
            raise RecipeError(
                f"a Trainer takes one SparsityCallback, got {len(callbacks)}. For layers of different sparsity, give "
                "one callback a config with several groups: SparsityConfig(groups=[...])"
            )
        if self.phase is Phase.REPLACED:
            raise RecipeError(
                "the masks of this SparsityCallback were taken off its model, by detach() or by a later Trainer with a "
                "SparsityCallback on the same model. Train with that one, or make a new Trainer with a new callback"
            )
        if self.phase is Phase.FINISHED and trainer.model is self._model:
            raise RecipeError(
                "this SparsityCallback has finished its run and its masks are permanent. To prune the model further, "
                "make a new Trainer with a new SparsityCallback"
            )
        self._attach(trainer.model, trainer.args)
        self._data = data_facts(trainer.train_dataset)
        if trainer.args.n_gpu > 1:
            raise RecipeError(
                "SparsityCallback does not work with nn.DataParallel; start one process per GPU (torchrun)"
            )
        assert self.pruner is not None
        check_deepspeed(trainer, self.pruner)
        self._flattened = trainer.is_deepspeed_enabled
        check_fsdp(trainer, self.pruner)
        guard_trainer(trainer)
        guard_checkpoints(trainer)
        assert self._terms is not None
        self._terms.refuse_if(trainer.compute_loss_func is not None, "compute_loss_func replaces the model's own loss")
        self._terms.follow(trainer)
        if self._terms.distiller is not None:
            check_cache(self._terms.distiller, trainer)

    def after_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Give learned scores their parameter group."""
        assert self.pruner is not None
        if group_scores(optimizer, self.pruner, trainer.lr_scheduler):
            self.pruner.warm_up(optimizer)
        super().after_optimizer(trainer, optimizer)

    @property
    def _model(self) -> nn.Module | None:
        return None if self.pruner is None else self.pruner.model

    def _attach(self, model: Any, args: TrainingArguments) -> None:
        if model is self._model:
            return
        check_optimizer(str(getattr(args.optim, "value", args.optim)))
        pruner = Pruner(model, self.config)
        measuring = next((group.scorer.name for group in pruner.groups if group.scorer.source == "heads"), None)
        if measuring is not None:
            raise RecipeError(
                f"scorer '{measuring}' measures a model on data before it is pruned, and never in training. Prune with "
                "sparsify(model, config, batches) or `hf-sparse prune --data`, then fine-tune; or use 'taylor' here"
            )
        take_over(model)
        # The teacher first: "self" is a copy of the model without masks.
        distiller = make_distiller(model, self.distillation, self._teacher) if self.distillation else None
        terms = (WrapperLossTerms if is_wrapper(model) else LossTerms)(model, pruner, distiller)
        warn_of_freed_zeros(pruner.groups)
        try:
            smoothing = args.label_smoothing_factor
            terms.refuse_if(smoothing, f"label_smoothing_factor={smoothing} replaces the model's own loss")
            pruner.attach()
        except SparsityError:
            terms.remove()
            raise
        if self._terms is not None:
            self._terms.remove()
        self.pruner, self._terms, self.phase = pruner, terms, Phase.ATTACHED
        set_owner(model, self)

    def detach(self) -> None:
        """Take the masks off a model whose training has not ended, and give it its dense weights back.

        A new `SparsityCallback` on the same model does this by itself.
        """
        if self._terms is not None:
            self._terms.remove()
        if self.phase is Phase.ATTACHED:
            assert self._model is not None
            remove_masks(self._model)
            release(self._model)
            self.phase = Phase.REPLACED
            assert self.pruner is not None
            self.pruner.attached = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the schedules against the real number of steps, and make the first masks."""
        pruner = self._pruner(kwargs.get("model"))
        self._check_scores_are_trained(kwargs.get("optimizer"), pruner)
        for group in pruner.groups:
            check_schedule(group, state.max_steps)
        if args.load_best_model_at_end:
            check_best_model(pruner, args, state)
        assert self._terms is not None
        self._terms.count_batches(args)
        self._resumed_at = record_sparsity(state, resolved(self.config), self._data, args.world_size)
        pruner.progress = self._progress(state)
        if state.global_step == 0:  # a resumed run has its masks from the checkpoint
            pruner.step(0.0, step=0)
        note_best_checkpoint(args, state)
        self._forget_early_best(state)

    def _progress(self, state: TrainerState) -> float:
        return max(state.global_step / state.max_steps, self._resumed_at)

    def _check_scores_are_trained(self, optimizer: Any, pruner: Pruner) -> None:
        if self._flattened:  # of what it had before, which `after_optimizer` has seen
            return
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [u.name for u in pruner.units if u.masked.scores is not None and id(u.masked.scores) not in trained]
        if missing:
            raise RecipeError(
                f"the movement scores of {len(missing)} weights (first: {missing[0]}) are not in the optimizer. A "
                "Trainer that overrides create_optimizer has to call super().create_optimizer(); a DeepSpeed config "
                "must not have an `optimizer` of its own"
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
        """Pass the gradients to the scorers that use them."""
        pruner = self._pruner(kwargs.get("model"))
        # accelerate's, in fp16 alone; it has unscaled the gradients of parameters by now, and changes after the step.
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        pruner.observe(1.0 if scaler is None else scaler.get_scale())
        assert self._terms is not None
        self._terms.check_trained()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Renew the masks for the next step, for evaluation and for the checkpoint of this one."""
        pruner = self._pruner(kwargs.get("model"))
        pruner.step(self._progress(state), step=state.global_step)
        last = state.global_step == state.max_steps
        if self.check_masks_every and (last or state.global_step % self.check_masks_every == 0):
            check_same_masks((unit.masked.mask for unit in pruner.units), f"step {state.global_step}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add sparsity, threshold, penalty and norms to what the Trainer logs."""
        logs = kwargs.get("logs")
        if self.pruner is None or not self.pruner.attached or not logs:
            return
        if "loss" in logs:
            values = self.pruner.logs() | (self._terms.logs() if self._terms is not None else {})
        elif any(key.startswith("eval_") for key in logs):
            values = {"eval_sparsity": self.pruner.logs()["sparsity"]}
        else:
            return
        self.add_to_logs(logs, state, values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the best checkpoint, or forget one that is not at the final sparsity."""
        note_best_checkpoint(args, state)
        self._forget_early_best(state)

    def _forget_early_best(self, state: TrainerState) -> None:
        if self.pruner is None or not state.max_steps:
            return
        if not all(group.schedule.reached(self._progress(state)) for group in self.pruner.groups):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    # -- after the last step -----------------------------------------------------------------------------------------

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the zeros permanent and take masks and scores off."""
        pruner = self._pruner(kwargs.get("model"))
        if all(group.schedule.reached(self._progress(state)) for group in pruner.groups):
            pruner.finish()
        else:
            logger.warning(
                f"training was stopped at step {state.global_step} of {state.max_steps}, before the schedule reached "
                f"its final sparsity; the model is at {pruner.logs()['sparsity']:.4f}"
            )
        pruner.bake()
        if self._terms is not None:
            self._terms.remove()
        self.phase = Phase.FINISHED
        release(pruner.model)

    def _pruner(self, model: nn.Module | None) -> Pruner:
        if self.pruner is None or not self.pruner.attached:
            raise RecipeError("SparsityCallback has no masks on the model: give it to the Trainer when you make it")
        return self.pruner


def _distillation(
    teacher: str | nn.Module | None, distillation: DistillationConfig | Mapping[str, Any] | None
) -> DistillationConfig | None:
    """Return the config of the distillation, or None if there is none."""
    if distillation is None and teacher is None:
        return None
    config = distillation if isinstance(distillation, DistillationConfig) else None
    if config is None:
        config = DistillationConfig.from_dict(distillation or {})  # type: ignore[arg-type]
    return dataclasses.replace(config, teacher=teacher) if isinstance(teacher, str) else config
