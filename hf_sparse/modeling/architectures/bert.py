"""BERT and the families with its layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import Attention, Family, FeedForward, Heads, register_family
from .caches import cache_of, fill_cache
from .fusion import AttentionFusion, FeedForwardFusion, ResidualNorm

_NAMES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")


class Headless(Swapped):
    """A self-attention module, without its output layer, all of whose heads are pruned."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zero features; the output layer adds its bias to nothing."""
        fill_cache(self, cache_of(kwargs), hidden_states, kwargs.get("encoder_hidden_states"))
        return hidden_states[..., :0], None


def resize(core: nn.Module, heads: Heads) -> None:
    """Let a self-attention state how many heads it has; without any it gives zero features."""
    module: Any = core
    kept = heads.kept
    module.num_attention_heads = len(kept)
    module.all_head_size = len(kept) * module.attention_head_size
    if not kept:
        swap_class(core, Headless)


_END = ResidualNorm(module="output", dropout="output.dropout", norm="output.LayerNorm")

BERT = Family(
    "BERT (BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA)",
    attentions=(
        Attention(
            classes=frozenset(f"{name}Attention" for name in _NAMES),
            inputs=("self.query", "self.key", "self.value"),
            output="output.dense",
            core="self",
            head_size="attention_head_size",
            resize=resize,
            heads_alike=True,
            cross_cores=frozenset(f"{name}CrossAttention" for name in _NAMES),
            fusion=AttentionFusion(
                cores=frozenset(f"{name}SelfAttention" for name in _NAMES),
                blocks=frozenset(f"{name}Attention" for name in _NAMES),
                residual=_END,
            ),
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset(f"{name}Layer" for name in _NAMES),
            inputs=("intermediate.dense",),
            output="output.dense",
            activation="intermediate.intermediate_act_fn",
            name="intermediate",
            fusion=FeedForwardFusion(method="feed_forward_chunk", residual=_END, chunks=True, attention="attention"),
        ),
    ),
)

register_family(BERT)
