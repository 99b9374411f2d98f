"""Hidden states and attention maps of the layers of teacher and student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.distillation import TERMS, DistillationConfig
from ...errors import SparsityError
from ..layer_map import fixed_pairs, nearest_pairs
from ..losses import attention_mse, masked_mse
from .base import NEVER, Comparison, Term

_STACKS = ("", "encoder_", "decoder_")


@TERMS.register("hidden")
@dataclasses.dataclass
class Hidden(Term):
    """The squared difference of hidden states, averaged over the pairs of layers of the layer map."""

    needs: ClassVar[tuple[str, ...]] = ("output_hidden_states",)

    def value(self, pair: Comparison) -> Tensor:
        losses = []
        for stack, s, t in _pairs_of_stacks(pair.student, pair.teacher, "hidden_states"):
            # The first entry is the embeddings, layer 0 is the second.
            ours, theirs, valid = list(s[1:]), list(t[1:]), _present(stack, pair.batch, s[0])
            pairs = _layer_pairs(pair.config, ours, theirs, valid)
            losses += [masked_mse(ours[i], theirs[j], valid) for i, j in pairs]
        return pair.share * torch.stack(losses).mean()


@TERMS.register("attention")
@dataclasses.dataclass
class Attention(Term):
    """The squared difference of attention maps, averaged over the pairs of layers of the layer map.

    Source: Jiao et al. 2020, "TinyBERT", equation 7.
    """

    needs: ClassVar[tuple[str, ...]] = ("output_attentions",)

    def value(self, pair: Comparison) -> Tensor:
        losses = []
        for stack, s, t in _pairs_of_stacks(pair.student, pair.teacher, "attentions"):
            valid = _present(stack, pair.batch, s[0].transpose(1, 2))
            pairs = fixed_pairs(pair.config, len(s), len(t))
            losses += [attention_mse(s[i], t[j], valid) for i, j in pairs]
        return pair.share * torch.stack(losses).mean()


def _layer_pairs(
    config: DistillationConfig, student: list[Tensor], teacher: list[Tensor], valid: Tensor | None
) -> list[tuple[int, int]]:
    if config.layer_map == "dynamic":
        # Every third of twelve, as CoFi has it: 2, 5, 8, 11.
        every = max(1, len(teacher) // 4)
        return nearest_pairs(student, teacher, list(range(every - 1, len(teacher), every)), valid)
    return fixed_pairs(config, len(student), len(teacher))


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
        kept = None if labels is None else labels != NEVER
    else:
        kept = batch.get("attention_mask")
    return None if kept is None or kept.shape != states.shape[:2] else kept.bool()
