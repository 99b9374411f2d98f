"""BERT and the families with its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import Attention, Changed, Family, FeedForward, become, cache_of, fill_cache

_NAMES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")


class Headless(Changed):
    """A self-attention module (its output layer is another) that has lost all its heads."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return nothing for the output layer to add its bias to."""
        fill_cache(self, cache_of(kwargs), hidden_states, kwargs.get("encoder_hidden_states"))
        return hidden_states[..., :0], None


def _resize(core: nn.Module, kept: Sequence[int], before: int) -> None:
    module: Any = core
    module.num_attention_heads = len(kept)
    module.all_head_size = len(kept) * module.attention_head_size
    if not kept:
        become(core, Headless)


BERT = Family(
    "BERT (BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA)",
    attentions=(
        Attention(
            classes=frozenset(f"{name}Attention" for name in _NAMES),
            inputs=("self.query", "self.key", "self.value"),
            output="output.dense",
            core="self",
            head_size="attention_head_size",
            resize=_resize,
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset(f"{name}Layer" for name in _NAMES),
            inputs=("intermediate.dense",),
            output="output.dense",
            activation="intermediate.intermediate_act_fn",
            name="intermediate",
        ),
    ),
)
