"""T5 (ReLU, v1.0) and its gated variants (v1.1, Flan, mT5, ByT5).

The first block computes the relative position bias for all heads of the model and passes it on to the others; each
attention adds the part of its own heads. So the embedding of the bias keeps all heads when heads are pruned, and what
is passed on always has all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..class_swap import Swapped, swap_class
from .base import Attention, Family, FeedForward, Heads, register_family
from .caches import cache_of, fill_cache
from .fusion import FeedForwardFusion


class Uneven(Swapped):
    """An attention with fewer heads than the position bias has.

    Attributes:
        all_heads: number of heads of the original model, and so of every bias that is passed on.
        runs: the heads that are left, as ranges: slices need no index tensor that would have to be on the right device.
    """

    all_heads: int
    runs: tuple[tuple[int, int], ...]

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend as before with the heads that are left, and pass on the bias of all."""
        if position_bias is None:
            position_bias = self.bias_of_all_heads(hidden_states, key_value_states, cache_of(kwargs))
        if not self.runs:
            fill_cache(self, cache_of(kwargs), hidden_states, key_value_states)
            return self.o(hidden_states[..., :0]), position_bias, None
        own = [position_bias[:, first:last] for first, last in self.runs]
        output, _, weights = super().forward(  # type: ignore[misc]
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=own[0] if len(own) == 1 else torch.cat(own, dim=1),
            **kwargs,
        )
        return output, position_bias, weights

    def bias_of_all_heads(self: Any, hidden_states: Tensor, key_value_states: Tensor | None, cache: Any) -> Tensor:
        """Return what the first attention of a stack computes: `(1, all heads, queries, keys)`."""
        queries = hidden_states.shape[1]
        past: Any = 0
        if key_value_states is not None:
            keys = key_value_states.shape[1]
        elif cache is None:
            keys = queries
        else:
            keys, _ = cache.get_mask_sizes(queries, self.layer_idx)
            past = cache.get_seq_length(self.layer_idx)
            past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
        if self.has_relative_attention_bias:
            return self.compute_bias(queries, keys, device=hidden_states.device, past_seen_tokens=past)
        bias = hidden_states.new_zeros((1, self.all_heads, queries, keys))
        # As transformers does: what is recomputed in the backward pass has to depend on something trained.
        return bias.requires_grad_() if self.gradient_checkpointing and self.training else bias


def runs_of(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending numbers as ranges.

    Example:
        >>> runs_of([0, 1, 2, 5])
        ((0, 3), (5, 6))
    """
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append((members[0], members[-1] + 1))
    return tuple(runs)


def _resize(core: nn.Module, heads: Heads) -> None:
    module: Any = core
    kept = heads.kept
    module.n_heads = len(kept)
    module.inner_dim = len(kept) * module.key_value_proj_dim
    module.all_heads, module.runs = heads.before, runs_of(kept)
    swap_class(core, Uneven)


_NAMES = ("T5", "MT5")

T5 = Family(
    "T5 (T5, Flan-T5, mT5, ByT5)",
    attentions=(
        Attention(
            classes=frozenset(f"{name}Attention" for name in _NAMES),
            inputs=("q", "k", "v"),
            output="o",
            head_size="key_value_proj_dim",
            resize=_resize,
            cross_names=frozenset({"EncDecAttention"}),
        ),
    ),
    feed_forwards=(
        FeedForward(
            classes=frozenset(f"{name}DenseActDense" for name in _NAMES),
            inputs=("wi",),
            output="wo",
            activation="act",
            fusion=FeedForwardFusion(method="forward", inner_dropout="dropout", reads_output_weight=True),
        ),
        FeedForward(
            classes=frozenset(f"{name}DenseGatedActDense" for name in _NAMES),
            inputs=("wi_0", "wi_1"),
            output="wo",
            activation="act",
            fusion=FeedForwardFusion(method="forward", inner_dropout="dropout", reads_output_weight=True),
        ),
    ),
)

register_family(T5)
