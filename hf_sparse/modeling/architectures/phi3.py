"""Phi-3: query, key and value as one projection (grouped queries), gate and up as another."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Attention, Family, FeedForward, HeadKeys, Heads, register_family
from .decoder import resize_grouped


class OwnCounts:
    """A config that an attention reads, with a number of heads of its own; all else is that of the model.

    Args:
        config: of the model.
        heads: of this attention.
    """

    def __init__(self, config: Any, heads: int) -> None:
        self.config, self.num_attention_heads = config, heads

    def __getattr__(self, name: str) -> Any:
        if name == "config" or (name.startswith("__") and name.endswith("__")):  # asked while it is copied
            raise AttributeError(name)
        return getattr(self.config, name)


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    config = module.config.config if isinstance(module.config, OwnCounts) else module.config
    module.config = OwnCounts(config, len(heads.kept))  # its forward divides the projection by the config
    resize_grouped(core, heads)


PHI3 = Family(
    "Phi-3",
    attentions=(
        Attention(
            classes=frozenset({"Phi3Attention"}),
            inputs=("qkv_proj", "qkv_proj", "qkv_proj"),
            output="o_proj",
            head_size="head_dim",
            resize=_resize,
            keys=HeadKeys(),
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset({"Phi3MLP"}),
            inputs=("gate_up_proj", "gate_up_proj"),
            output="down_proj",
            activation="activation_fn",
            key="intermediate_size",
        ),
    ),
)

register_family(PHI3)
