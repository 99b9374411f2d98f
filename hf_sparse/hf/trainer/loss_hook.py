"""What sparsity adds to the loss of a model: the penalty of a scorer, and what a teacher says.

A hook on the model's forward changes `outputs.loss`, so that every Trainer whose loss is the model's works unchanged.
Where the loss is not the model's, the terms would be lost, and that is an error before the first optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ...distillation.distiller import Distiller
from ...errors import RecipeError
from ...pruning.pruner import Pruner

_NOT_CONTAINED = "the loss that this Trainer trains on does not contain the `loss` of the model's outputs"


class LossTerms:
    """Add the terms to the loss of a model in training, until `remove`.

    Args:
        model: whose outputs have a loss.
        pruner: whose penalty is added, where its scorers have one; None where nothing is pruned.
        distiller: None trains on the task alone.

    Attributes:
        batches: how many batches make an optimizer step, where the Trainer sums their losses instead of averaging them.
    """

    def __init__(self, model: nn.Module, pruner: Pruner | None, distiller: Distiller | None = None) -> None:
        self.pruner = pruner
        self.distiller = distiller
        self.batches = 1.0
        self._reached: bool | None = None
        self._hooks: list[Any] = []
        if self.any:
            self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        self._hooks.append(model.register_forward_hook(self._add, with_kwargs=True))
        if self.distiller is not None and self.distiller.wanted():
            self._hooks.append(model.register_forward_pre_hook(self._ask_for_more, with_kwargs=True))

    def follow(self, trainer: Trainer) -> None:
        """Learn which Trainer trains the model; its loss is that of the model."""

    @property
    def any(self) -> bool:
        """Whether there is anything to add."""
        return self._penalized is not None or self.distiller is not None

    @property
    def _penalized(self) -> Pruner | None:
        return self.pruner if self.pruner is not None and self.pruner.has_penalty else None

    def count_batches(self, args: TrainingArguments) -> None:
        """Learn from the arguments of a Trainer how many batches it makes a step of."""
        self.batches = float(args.gradient_accumulation_steps)
        if args.average_tokens_across_devices:
            self.batches *= args.world_size

    def refuse_if(self, condition: object, why: str) -> None:
        """Raise `RecipeError` if there are terms and they would be lost.

        Args:
            condition: true if they would.
            why: the middle of the sentence.
        """
        if self.any and condition:
            raise self._lost(why)

    def check_trained(self) -> None:
        """Raise `RecipeError` if a backward pass has shown that the loss does not contain the terms."""
        self.refuse_if(not self._reached, _NOT_CONTAINED)

    def logs(self) -> dict[str, float]:
        """Return numbers for a training log."""
        return self.distiller.logs() if self.distiller is not None else {}

    def remove(self) -> None:
        """Leave the model as it was, and let the teacher go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.distiller = [], None

    def _ask_for_more(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._applies(model):
            return None
        assert self.distiller is not None
        return args, {**kwargs, **self.distiller.wanted()}

    def _applies(self, model: nn.Module) -> bool:
        return (self.pruner is None or self.pruner.attached) and model.training and torch.is_grad_enabled()

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self._applies(model):
            return outputs
        # The Trainer then sums the losses of the accumulated batches (and processes) instead of averaging them.
        share = 1.0 / self.batches if kwargs.get("num_items_in_batch") is not None else 1.0
        loss = self._task_loss(outputs)
        if self.distiller is not None:
            distilled = self._distillation_loss(outputs, args, kwargs, share)
            loss = distilled if loss is None else self.distiller.config.task_weight * loss + distilled.to(loss)
        assert loss is not None
        if self._penalized is not None:
            loss = loss + share * self._penalized.penalty().to(loss)
        self._watch(loss)
        if isinstance(outputs, dict):
            outputs["loss"] = loss
            return outputs
        return (loss, *outputs[1:])

    def _watch(self, loss: Tensor) -> None:
        """Note whether a backward pass goes through the loss."""
        if self._reached is None and loss.requires_grad:
            self._reached = False
            loss.register_hook(self._note)

    def _distillation_loss(self, outputs: Any, args: Any, kwargs: dict[str, Any], share: float) -> Tensor:
        assert self.distiller is not None
        self.refuse_if(not isinstance(outputs, dict), "the model returns a tuple, whose parts have no names")
        self._move_teacher(next(value.device for value in outputs.values() if isinstance(value, Tensor)))
        return self.distiller.loss(outputs, args, kwargs, share)

    def _move_teacher(self, device: torch.device) -> None:
        teacher = None if self.distiller is None else self.distiller.teacher
        if isinstance(teacher, nn.Module):
            own = next(teacher.parameters(), None)
            if own is not None and own.device != device:
                teacher.to(device)

    def _task_loss(self, outputs: Any) -> Tensor | None:
        """Return the loss that the model has computed; None where there is none and none is requested."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else None
        if loss is None and self.distiller is not None and not self.distiller.config.task_weight:
            return None
        if not isinstance(loss, Tensor) or loss.ndim:
            raise self._lost(
                "the model returned no loss (are there labels in the batch? Without any, set task_weight: 0)"
            )
        return loss

    def _note(self, gradient: Tensor) -> None:
        self._reached = True

    def _lost(self, why: str) -> RecipeError:
        if self._penalized is not None:
            name = next(group.scorer.name for group in self._penalized.groups if group.scorer.penalized)
            what, instead = f"scorer '{name}'", "use scorer 'movement', which needs no term"
        else:
            what, instead = "distillation", "leave the teacher out"
        return RecipeError(
            f"{what} adds a term to the loss, but {why}, so the term would be lost. Train without that, or {instead}"
        )
