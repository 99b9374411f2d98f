"""The terms of a wrapped model: sentence-transformers' Trainers compute the loss themselves, from embeddings.

A hook sees each forward pass of the wrapper (one for each column of sentences) and asks the teacher about it. What it
says is added where the Trainer computes its loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ...distillation.distiller import Distiller
from ...errors import RecipeError
from ...pruning.pruner import Pruner
from .. import patches
from ..embedding.wrapper import Recorder, features_of, with_embedding
from .loss_hook import LossTerms


class WrapperLossTerms(LossTerms):
    """Add the terms to the loss of a Trainer of sentence-transformers, until `remove`.

    Args:
        model: a SentenceTransformer, CrossEncoder or SparseEncoder.
        pruner, distiller: as in `LossTerms`.
    """

    def __init__(self, model: nn.Module, pruner: Pruner | None, distiller: Distiller | None = None) -> None:
        self._trainer: Trainer | None = None
        self._distilled: list[Tensor] = []
        self._features: dict[str, Any] = {}
        self._recorder: Recorder | None = None
        super().__init__(model, pruner, distiller)

    def _hook(self, model: nn.Module) -> None:
        if self.distiller is None:
            return
        self._recorder = Recorder(model, lambda: self._wanted(model))
        self._hooks += [model.register_forward_pre_hook(self._remember), model.register_forward_hook(self._compare)]

    def _wanted(self, model: nn.Module) -> dict[str, bool]:
        return self.distiller.wanted() if self.distiller is not None and self._applies(model) else {}

    def follow(self, trainer: Trainer) -> None:
        """Add the terms where this Trainer computes its loss."""
        if self.any and self._trainer is not trainer:
            self._trainer = trainer
            patches.put(trainer, "compute_loss", partial(self._compute, trainer, trainer.compute_loss))

    def remove(self) -> None:
        """Leave model and Trainer as they were, and let the teacher go."""
        super().remove()
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder, self._features, self._distilled = None, {}, []
        if self._trainer is not None:
            patches.take(self._trainer, "compute_loss")
            self._trainer = None

    # -- one forward pass of the wrapper -----------------------------------------------------------------------------

    def _remember(self, model: nn.Module, args: Any) -> None:
        if self._applies(model) and args:
            self._features = dict(args[0])  # the modules write their outputs into the mapping itself

    def _compare(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if not self._applies(model):
            return
        assert self.distiller is not None
        assert self._recorder is not None
        student, features = with_embedding(self._recorder.found, outputs), self._features
        self._recorder.found, self._features = {}, {}
        place = next((value.device for value in student.values() if isinstance(value, Tensor)), torch.device("cpu"))
        self._move_teacher(place)
        self._distilled.append(self.distiller.loss(student, (), features, 1.0))

    # -- one batch of the Trainer ------------------------------------------------------------------------------------

    def _compute(
        self,
        trainer: Any,
        original: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return original(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        self._distilled = []
        share = 1.0 / self.batches if num_items_in_batch is not None else 1.0
        weight = 1.0 if self.distiller is None else self.distiller.config.task_weight
        if weight:
            loss = weight * original(model, inputs, num_items_in_batch=num_items_in_batch)
        else:
            loss = self._without_task(trainer, model, inputs)
        if self.distiller is not None:
            loss = loss + share * self._mean_distillation().to(loss)
        if self._penalized is not None:
            loss = loss + share * self._penalized.penalty().to(loss)
        self._watch(loss)
        return (loss, {}) if return_outputs else loss

    def _without_task(self, trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Run the model on the batch without a loss of the Trainer; no labels are needed."""
        for features in features_of(trainer, trainer.accelerator.unwrap_model(model), inputs):
            model(features)
        return torch.zeros((), device=trainer.args.device)

    def _mean_distillation(self) -> Tensor:
        if not self._distilled:
            raise RecipeError(
                f"distillation compares what the model returns in training, but the loss {self._loss_name()} runs the "
                "model without gradients, or not at all (as Cached* losses do), so the distillation loss would be "
                "lost. Use a loss that runs it once, or set task_weight: 0"
            )
        mean, self._distilled = torch.stack(self._distilled).mean(), []
        return mean

    def _loss_name(self) -> str:
        return type(getattr(self._trainer, "loss", None)).__name__
