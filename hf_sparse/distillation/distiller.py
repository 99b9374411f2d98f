"""Distillation in training: run the teacher on the batch of the student, compare outputs, return a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.distillation import TERMS, DistillationConfig
from ..errors import SparsityError
from .example_keys import Examples
from .terms import Comparison, Term
from .terms.base import EMBEDDING

NOT_FOR_THE_TEACHER = ("labels", "start_positions", "end_positions", "num_items_in_batch", "return_loss")


class CachedOutputs(Protocol):
    """Outputs that a teacher has computed before, in place of the teacher."""

    def look_up(self, examples: Examples) -> Mapping[str, Any]:
        """Return the teacher's outputs for a batch, by name."""


Embed = Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]
"""Makes one vector for each example of outputs and batch."""


class Distiller:
    """Hold a frozen teacher and compute the distillation loss of a student.

    Args:
        teacher: takes the same keyword arguments as the student and returns outputs with the same names; or outputs
            that it has computed before.
        config: weights of the losses, temperature, layer map.
        shifts_labels: whether the labels of a position are those of the next one (decoder-only language models).
        decoder_inputs: makes `decoder_input_ids` of labels, for encoder-decoders.
        problem_type: returns the `problem_type` of the student's config, which the first batch may set; None = unknown.
        embeds: whether the model returns embeddings and no logits.
        pools: make the embedding of outputs that have none, of the student and of the teacher; None = they have one.
    """

    def __init__(
        self,
        teacher: nn.Module | CachedOutputs,
        config: DistillationConfig,
        shifts_labels: bool = False,
        decoder_inputs: Callable[[Tensor], Tensor] | None = None,
        problem_type: Callable[[], str | None] = lambda: None,
        embeds: bool = False,
        pools: tuple[Embed, Embed] | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False) if isinstance(teacher, nn.Module) else teacher
        self.config = config
        self.shifts_labels = shifts_labels
        self.decoder_inputs = decoder_inputs
        self.problem_type = problem_type
        self.weights = config.weights(embeds)
        self.terms: dict[str, Term] = {name: TERMS.build(config.spec(name)) for name in self.weights}
        self.pools = pools if any(term.embeds for term in self.terms.values()) else None
        self.seen: dict[str, list[Tensor]] = {}

    def wanted(self) -> dict[str, bool]:
        """Return the keyword arguments that teacher and student need beside those of the batch."""
        return {argument: True for term in self.terms.values() for argument in term.needs}

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
        outputs = self.teacher(*args, **{**inputs, **self.wanted()})
        return outputs if self.pools is None else _with_embedding(outputs, batch, self.pools[1])

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
        """Return the weighted sum of the losses for one batch.

        Args:
            student: outputs of the student, by name.
            args, batch: what the student was called with.
            share: of the optimizer step that this batch is, where the caller sums batches instead of averaging them.

        Raises:
            SparsityError: if teacher and student cannot be compared.
        """
        teacher = self.teacher_outputs(args, batch)
        if self.pools is not None:
            student = _with_embedding(student, batch, self.pools[0])
        pair = Comparison(student, teacher, batch, self.config, share, self.shifts_labels, self.problem_type)
        total: Tensor | None = None
        for name, term in self.terms.items():
            value = term.value(pair)
            # A tensor: a number would wait for the device.
            self.seen.setdefault(term.log_name, []).append(value.detach())
            total = self.weights[name] * value if total is None else total + self.weights[name] * value
        assert total is not None
        return total

    def logs(self) -> dict[str, float]:
        """Return the mean of each loss over the batches since the last call, as it went into their loss."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.seen.items()}
        self.seen.clear()
        return means


def _with_embedding(outputs: Any, batch: Mapping[str, Any], pool: Embed) -> dict[str, Any]:
    return {**outputs, EMBEDDING: pool(outputs, batch)}
