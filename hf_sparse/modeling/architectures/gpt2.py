"""GPT-2: layers are `Conv1D` (weights `[in, out]`); query, key and value are thirds of one. Cross-attention stays."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Attention, Family, FeedForward, Heads, register_family
from .decoder import Headless, remove_all, set_counts


class HeadlessWithDropout(Headless):
    """An attention, with its output layer and a dropout after it, all of whose heads are pruned."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the bias of the output layer."""
        out, weights = super().forward(hidden_states, *args, **kwargs)
        return self.resid_dropout(out), weights


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    set_counts(core, num_heads=len(heads.kept), split_size=len(heads.kept) * module.head_dim)
    if not heads.kept:
        remove_all(core, "c_proj", HeadlessWithDropout)


GPT2 = Family(
    "GPT-2",
    attentions=(
        Attention(
            classes=frozenset({"GPT2Attention"}),
            inputs=("c_attn", "c_attn", "c_attn"),
            output="c_proj",
            head_size="head_dim",
            resize=_resize,
            heads_alike=True,
            absent=("q_attn",),
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"GPT2MLP"}),
            inputs=("c_fc",),
            output="c_proj",
            activation="act",
            key="n_inner",
        ),
    ),
)

register_family(GPT2)
