"""Distillation in training: run the teacher on the batch of the student, compare outputs, return a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.distillation import DistillationConfig
from ..errors import SparsityError
from .example_keys import Examples
from .layer_map import fixed_pairs, nearest_pairs
from .losses import attention_mse, masked_mse, sigmoid_kl, soft_target_kl

NOT_FOR_THE_TEACHER = ("labels", "start_positions", "end_positions", "num_items_in_batch", "return_loss")
_NEVER = -100  # label of a position that is not trained, everywhere in transformers
_STACKS = ("", "encoder_", "decoder_")


class CachedOutputs(Protocol):
    """Outputs that a teacher has computed before, in place of the teacher."""

    def look_up(self, examples: Examples) -> Mapping[str, Tensor]:
        """Return the teacher's outputs for a batch, by name."""


class Distiller:
    """Hold a frozen teacher and compute the distillation loss of a student.

    Args:
        teacher: takes the same keyword arguments as the student and returns outputs with the same names; or outputs
            that it has computed before.
        config: weights of the terms, temperature, layer map.
        shifts_labels: whether the labels of a position are those of the next one (decoder-only language models).
        decoder_inputs: makes `decoder_input_ids` of labels, for encoder-decoders.
        problem_type: returns the `problem_type` of the student's config, which the first batch may set; None = unknown.
    """

    def __init__(
        self,
        teacher: nn.Module | CachedOutputs,
        config: DistillationConfig,
        shifts_labels: bool = False,
        decoder_inputs: Callable[[Tensor], Tensor] | None = None,
        problem_type: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False) if isinstance(teacher, nn.Module) else teacher
        self.config = config
        self.shifts_labels = shifts_labels
        self.decoder_inputs = decoder_inputs
        self.problem_type = problem_type
        self.seen: dict[str, list[Tensor]] = {}

    def wanted(self) -> dict[str, bool]:
        """Return the keyword arguments that teacher and student need beside those of the batch."""
        return {
            **({"output_hidden_states": True} if self.config.hidden_weight else {}),
            **({"output_attentions": True} if self.config.attention_weight else {}),
        }

    @torch.no_grad()
    def teacher_outputs(self, args: tuple[Any, ...], batch: Mapping[str, Any]) -> Any:
        """Return the outputs of the teacher for a batch, without its loss."""
        if not isinstance(self.teacher, nn.Module):
            if args:
                raise SparsityError("a cached teacher needs inputs by name, as in model(input_ids=...)")
            return self.teacher.look_up(self.examples(batch))
        inputs = self._inputs(batch)
        if self.decoder_inputs is not None or self.shifts_labels:
            inputs["use_cache"] = False  # for generating only, and large
        return self.teacher(*args, **{**inputs, **self.wanted()})

    def examples(self, batch: Mapping[str, Any]) -> Examples:
        """Return the examples of a batch, as the teacher sees them."""
        return Examples(self._inputs(batch), batch.get("labels"), self.decoder_inputs is not None)

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_TEACHER}
        labels = batch.get("labels")
        if self.decoder_inputs is not None and inputs.get("decoder_input_ids") is None and labels is not None:
            inputs["decoder_input_ids"] = self.decoder_inputs(labels)
        return inputs

    def loss(self, student: Mapping[str, Any], args: tuple[Any, ...], batch: Mapping[str, Any], share: float) -> Tensor:
        """Return the weighted sum of the terms for one batch.

        Args:
            student: outputs of the student, by name.
            args, batch: what the student was called with.
            share: of the optimizer step that this batch is, where the caller sums batches instead of averaging them.

        Raises:
            SparsityError: if teacher and student cannot be compared.
        """
        teacher = self.teacher_outputs(args, batch)
        terms = {
            "distillation_kl": (self.config.logits_weight, self._logits),
            "distillation_hidden": (self.config.hidden_weight, self._hidden),
            "distillation_attention": (self.config.attention_weight, self._attentions),
        }
        total: Tensor | None = None
        for name, (weight, term) in terms.items():
            if not weight:
                continue
            value = term(student, teacher, batch, share)
            self.seen.setdefault(name, []).append(value.detach())  # a tensor: a number would wait for the device
            total = weight * value if total is None else total + weight * value
        assert total is not None
        return total

    def logs(self) -> dict[str, float]:
        """Return the mean of each term over the batches since the last call, as it went into their loss."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.seen.items()}
        self.seen.clear()
        return means

    # -- terms -------------------------------------------------------------------------------------------------------

    def _logits(self, student: Mapping[str, Any], teacher: Any, batch: Mapping[str, Any], share: float) -> Tensor:
        names = [name for name in ("logits", "start_logits", "end_logits") if student.get(name) is not None]
        if not names:
            raise SparsityError(
                f"the model returns no logits to distil, but {', '.join(student)}. TRL's SFTTrainer, for one, never "
                "has them all at once: use the Trainer of transformers, set logits_weight=0 and give hidden_weight, "
                "or leave the teacher out"
            )
        return torch.stack([self._one(student[n], teacher[n], batch, n == "logits", share) for n in names]).mean()

    def _one(self, s: Tensor, t: Tensor, batch: Mapping[str, Any], is_classes: bool, share: float) -> Tensor:
        if not is_classes:  # logits over the positions of a sequence, without padding
            kept = batch.get("attention_mask")
            classes = None if kept is None or kept.shape != s.shape else kept.bool()
            return share * soft_target_kl(s, t, self.config.temperature, classes=classes)
        labels, count = batch.get("labels"), batch.get("num_items_in_batch")
        if s.shape[-1] == 1 or self.problem_type() == "regression":  # numbers have no distribution
            return share * masked_mse(s, t)
        if self._is_multi_label(s, labels):
            return share * sigmoid_kl(s, t, self.config.temperature)
        valid = self._trained(s, batch)
        if labels is None or count is None:
            return share * soft_target_kl(s, t, self.config.temperature, valid)
        # The Trainer counts the labels of all accumulated batches, so that long batches weigh more than short ones.
        return soft_target_kl(s, t, self.config.temperature, valid, count=count)

    def _is_multi_label(self, logits: Tensor, labels: Tensor | None) -> bool:
        """Return whether each class is a yes or no of its own: float labels of the shape of the logits, as usual."""
        declared = self.problem_type()
        if declared is not None:
            return declared == "multi_label_classification"
        return labels is not None and labels.is_floating_point() and labels.shape == logits.shape

    def _trained(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Return which positions have a label; padded targets of a sequence have none."""
        labels = batch.get("labels")
        if logits.ndim < 3:
            return None if labels is None or labels.shape != logits.shape[:-1] else labels != _NEVER
        if labels is None or labels.shape != logits.shape[:-1]:
            kept = batch.get("attention_mask")
            return None if kept is None or kept.shape != logits.shape[:-1] else kept.bool()
        if not self.shifts_labels:
            return labels != _NEVER
        last = torch.full_like(labels[:, :1], _NEVER)
        return torch.cat([labels[:, 1:], last], dim=1) != _NEVER

    def _hidden(self, student: Mapping[str, Any], teacher: Any, batch: Mapping[str, Any], share: float) -> Tensor:
        losses = []
        for stack, s, t in _pairs_of_stacks(student, teacher, "hidden_states"):
            # The first entry is the embeddings, layer 0 is the second.
            ours, theirs, valid = list(s[1:]), list(t[1:]), _present(stack, batch, s[0])
            losses += [masked_mse(ours[i], theirs[j], valid) for i, j in self._layer_pairs(ours, theirs, valid)]
        return share * torch.stack(losses).mean()

    def _attentions(self, student: Mapping[str, Any], teacher: Any, batch: Mapping[str, Any], share: float) -> Tensor:
        losses = []
        for stack, s, t in _pairs_of_stacks(student, teacher, "attentions"):
            valid = _present(stack, batch, s[0].transpose(1, 2))
            pairs = fixed_pairs(self.config, len(s), len(t))
            losses += [attention_mse(s[i], t[j], valid) for i, j in pairs]
        return share * torch.stack(losses).mean()

    def _layer_pairs(self, student: list[Tensor], teacher: list[Tensor], valid: Tensor | None) -> list[tuple[int, int]]:
        if self.config.layer_map == "dynamic":
            # Every third of twelve, as CoFi has it: 2, 5, 8, 11.
            every = max(1, len(teacher) // 4)
            return nearest_pairs(student, teacher, list(range(every - 1, len(teacher), every)), valid)
        return fixed_pairs(self.config, len(student), len(teacher))


def _pairs_of_stacks(student: Mapping[str, Any], teacher: Any, what: str) -> list[tuple[str, Any, Any]]:
    """Return encoder and decoder of an encoder-decoder, or the one stack of any other model."""
    found = [(stack, student.get(stack + what), teacher.get(stack + what)) for stack in _STACKS]
    found = [(stack, s, t) for stack, s, t in found if s and t and s[0] is not None and t[0] is not None]
    if not found:
        raise SparsityError(
            f"model or teacher return no {what}, so there is nothing to compare. Attention maps need models loaded "
            'with attn_implementation="eager"'
        )
    return found


def _present(stack: str, batch: Mapping[str, Any], states: Tensor) -> Tensor | None:
    """Return which positions of a stack are not padding."""
    if stack == "decoder_":
        labels = batch.get("labels")
        kept = None if labels is None else labels != _NEVER
    else:
        kept = batch.get("attention_mask")
    return None if kept is None or kept.shape != states.shape[:2] else kept.bool()
