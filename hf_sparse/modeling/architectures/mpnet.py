"""MPNet: as BERT, with a relative position bias for all heads of the model that every layer gets.

So each attention takes the part of the bias that its own heads have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import Attention, Family, FeedForward, Heads, register_family
from .t5 import runs_of


class Uneven(Swapped):
    """A self-attention, with its output layer, with fewer heads than the position bias has.

    Attributes:
        runs: the heads that are left, as ranges.
    """

    runs: tuple[tuple[int, int], ...]

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, *args: Any, **kw: Any
    ) -> Any:
        """Attend as before with the heads that are left."""
        if not self.runs:
            return (self.o(hidden_states[..., :0]),)
        if position_bias is not None:
            position_bias = torch.cat([position_bias[:, first:last] for first, last in self.runs], dim=1)
        return super().forward(hidden_states, attention_mask, position_bias, *args, **kw)  # type: ignore[misc]


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    module.num_attention_heads = len(heads.kept)
    module.all_head_size = len(heads.kept) * module.attention_head_size
    module.runs = runs_of(heads.kept)
    swap_class(core, Uneven)


MPNET = Family(
    "MPNet",
    attentions=(
        Attention(
            classes=frozenset({"MPNetAttention"}),
            inputs=("attn.q", "attn.k", "attn.v"),
            output="attn.o",
            core="attn",
            head_size="attention_head_size",
            resize=_resize,
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"MPNetLayer"}),
            inputs=("intermediate.dense",),
            output="output.dense",
            activation="intermediate.intermediate_act_fn",
            name="intermediate",
        ),
    ),
)

register_family(MPNET)
