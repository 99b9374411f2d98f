"""DistilBERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import Attention, Family, FeedForward, Heads, register_family
from .fusion import AttentionFusion, FeedForwardFusion


class Headless(Swapped):
    """An attention, with its output layer, all of whose heads are pruned."""

    out_lin: nn.Linear

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the bias of the output layer."""
        return self.out_lin(hidden_states[..., :0]), None


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    kept = heads.kept
    module.n_heads = len(kept)
    module.dim = len(kept) * module.attention_head_size
    if not kept:
        swap_class(core, Headless)


DISTILBERT = Family(
    "DistilBERT",
    attentions=(
        Attention(
            classes=frozenset({"DistilBertSelfAttention"}),
            inputs=("q_lin", "k_lin", "v_lin"),
            output="out_lin",
            head_size="attention_head_size",
            resize=_resize,
            heads_alike=True,
            fusion=AttentionFusion(cores=frozenset({"DistilBertSelfAttention"}), core_has_output=True),
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"FFN"}),
            inputs=("lin1",),
            output="lin2",
            activation="activation",
            marks=("activation", "ff_chunk", "chunk_size_feed_forward"),
            fusion=FeedForwardFusion(method="ff_chunk", output_dropout="dropout", chunks=True),
        ),
    ),
)

register_family(DISTILBERT)
