"""What the families of decoders share: grouped queries, attentions without heads, gated feed-forward parts.

A head is a query head. Heads may leave in any number. If as many stay for each KV head, the attention is plain, with
another `num_key_value_groups`; otherwise keys and values are repeated behind the cache (`UnevenQueries`). A KV head
leaves with the last head that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import Attention, FeedForward, HeadKeys, Heads
from .caches import cache_of, fill_cache, repeat_evenly, repeat_unevenly
from .fusion import FeedForwardFusion


class Headless(Swapped):
    """An attention, with its output layer, all of whose heads are pruned.

    Attributes:
        output_layer: name of the output layer.
    """

    output_layer: str

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the bias of the output layer, or zeros."""
        fill_cache(self, cache_of(kwargs), hidden_states, kwargs.get("encoder_hidden_states"))
        return self.get_submodule(self.output_layer)(hidden_states[..., :0]), None


def remove_all(core: nn.Module, output: str, mixin: type[Headless] = Headless) -> None:
    """Let an attention that has lost every head give the bias of its output layer, of this name."""
    module: Any = core
    module.output_layer = output
    swap_class(core, mixin)


def set_counts(core: nn.Module, **counts: int) -> None:
    """Set those of these attributes that an attention has; its class decides which they are."""
    for name, count in counts.items():
        if name in vars(core):
            setattr(core, name, count)


def resize_grouped(core: nn.Module, heads: Heads) -> None:
    """Let an attention with KV heads of its own number know which heads stay."""
    repeat_evenly(core)
    each = heads.per_kv[0] if len(set(heads.per_kv)) == 1 else 1
    set_counts(core, num_heads=len(heads.kept), num_key_value_heads=len(heads.per_kv), num_key_value_groups=each)
    if not heads.kept:
        remove_all(core, "o_proj")
    elif len(set(heads.per_kv)) > 1:
        repeat_unevenly(core, heads.per_kv)


def grouped_attention(names: Iterable[str]) -> Attention:
    """Return the table of attentions with the layers `{q,k,v,o}_proj`.

    Args:
        names: of the families, as their classes begin.
    """
    return Attention(
        classes=frozenset(f"{name}Attention" for name in names),
        inputs=("q_proj", "k_proj", "v_proj"),
        output="o_proj",
        head_size="head_dim",
        resize=resize_grouped,
        keys=HeadKeys(),
    )


def gated_mlp(names: Iterable[str], key: str | None = "intermediate_size") -> FeedForward:
    """Return the table of feed-forward parts with the layers `{gate,up,down}_proj`.

    Args:
        names: of the families, as their classes begin.
        key: of the config, see `FeedForward`.
    """
    return FeedForward(
        classes=frozenset(f"{name}MLP" for name in names),
        inputs=("gate_proj", "up_proj"),
        output="down_proj",
        activation="act_fn",
        fusion=FeedForwardFusion(method="forward"),
        key=key,
    )
