"""DistilBERT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import Attention, Changed, Family, FeedForward, become


class Headless(Changed):
    """An attention, with its output layer, that has lost all its heads."""

    out_lin: nn.Linear

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the bias of the output layer."""
        return self.out_lin(hidden_states[..., :0]), None


def _resize(core: nn.Module, kept: Sequence[int], before: int) -> None:
    module: Any = core
    module.n_heads = len(kept)
    module.dim = len(kept) * module.attention_head_size
    if not kept:
        become(core, Headless)


DISTILBERT = Family(
    "DistilBERT",
    attentions=(
        Attention(
            classes=frozenset({"DistilBertSelfAttention"}),
            inputs=("q_lin", "k_lin", "v_lin"),
            output="out_lin",
            head_size="attention_head_size",
            resize=_resize,
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"FFN"}),
            inputs=("lin1",),
            output="lin2",
            activation="activation",
            marks=("activation", "ff_chunk", "chunk_size_feed_forward"),
        ),
    ),
)
