"""DistillationCallback: learn from a teacher in a Trainer that prunes nothing, such as the last of several stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ...config.distillation import DistillationConfig
from ...errors import RecipeError
from ..embedding.wrapper import is_wrapper
from .log_first import LogsFirst
from .loss_hook import LossTerms
from .teacher import check_cache, make_distiller
from .wrapper_loss import WrapperLossTerms


class DistillationCallback(LogsFirst):
    """Add what a teacher says to the loss of a model that is not being pruned. (`SparsityCallback` does that itself.)

    Args:
        distillation: how, a `DistillationConfig` or a mapping with its keys. The teacher is another model: a copy of
            this one ("self") would say nothing that it does not know.
        teacher: a module in place of the one that `distillation` names.

    Raises:
        RecipeError: before the first step, if the teacher does not fit or what it says would be lost.

    Source: Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 4.3 (the "filled" models).
    """

    def __init__(self, distillation: DistillationConfig | Mapping[str, Any], teacher: nn.Module | None = None) -> None:
        made = distillation
        self.config = made if isinstance(made, DistillationConfig) else DistillationConfig.from_dict(made)
        if teacher is None and self.config.teacher == "self":
            raise RecipeError("distillation: teacher 'self' is for a model that is pruned; name another model here")
        self._teacher = teacher
        self._model: nn.Module | None = None
        self._terms: LossTerms | None = None

    def before_optimizer(self, trainer: Trainer) -> None:
        """Get the teacher, and check that it can be heard."""
        if trainer.args.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise RecipeError(
                "DistillationCallback works on one device per process: not with nn.DataParallel, FSDP or DeepSpeed. "
                "Use torchrun (DDP)"
            )
        model: Any = trainer.model
        if model is self._model:
            return
        kind = WrapperLossTerms if is_wrapper(model) else LossTerms
        terms = kind(model, None, make_distiller(model, self.config, self._teacher))
        smoothing = trainer.args.label_smoothing_factor
        try:
            terms.refuse_if(smoothing, f"label_smoothing_factor={smoothing} replaces the model's own loss")
            terms.refuse_if(trainer.compute_loss_func is not None, "compute_loss_func replaces the model's own loss")
            assert terms.distiller is not None
            check_cache(terms.distiller, trainer)
            terms.follow(trainer)
        except Exception:
            terms.remove()
            raise
        self._model, self._terms = model, terms

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn how many losses the Trainer adds up."""
        if self._terms is None:
            raise RecipeError("DistillationCallback has no teacher: give it to the Trainer when you make it")
        self._terms.count_batches(args)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the loss contains the distillation loss."""
        assert self._terms is not None
        self._terms.check_trained()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the terms to what the Trainer logs."""
        logs = kwargs.get("logs")
        if self._terms is None or not logs or "loss" not in logs:
            return
        self.add_to_logs(logs, state, self._terms.logs())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the teacher go."""
        if self._terms is not None:
            self._terms.remove()
        self._terms = self._model = None
