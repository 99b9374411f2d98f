"""ModernBERT: query, key and value as one projection, the activated half and the gate as another."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Attention, Family, FeedForward, Heads, register_family
from .decoder import Headless, remove_all


class HeadlessWithDropout(Headless):
    """An attention, with its output layer and a dropout after it, all of whose heads are pruned."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the bias of the output layer, or zeros."""
        out, weights = super().forward(hidden_states, *args, **kwargs)
        return self.out_drop(out), weights


def _resize(core: nn.Module, heads: Heads) -> None:
    if not heads.kept:
        remove_all(core, "Wo", HeadlessWithDropout)


MODERNBERT = Family(
    "ModernBERT",
    attentions=(
        Attention(
            classes=frozenset({"ModernBertAttention"}),
            inputs=("Wqkv", "Wqkv", "Wqkv"),
            output="Wo",
            head_size="head_dim",
            resize=_resize,
            heads_alike=True,
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"ModernBertMLP"}),
            inputs=("Wi", "Wi"),
            output="Wo",
            activation="act",
            key="intermediate_size",
        ),
    ),
)

register_family(MODERNBERT)
