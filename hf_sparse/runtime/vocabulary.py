"""The product with the vocabulary: it stays dense, and laid out by columns it is faster for one token at a time.

A model that generates multiplies one token with the whole table of the vocabulary at each step, which soon takes most
of the time that pruning has left. One row of the input times rows of the weight is a dot product each; times columns it
adds up whole vectors. The values, the shape and what is tied to them stay, only the strides change; the state dict has
copies by rows, since files and those who write them know no strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .timing import Race, SpeedTable, Trial

KERNEL = "by_columns"
"""Of the report: dense, with another layout."""

TOKENS = (1, 16, 128)
"""Numbers of tokens that are timed. The least has to gain; the others must not lose."""

LOSS = 0.03
"""What the others may lose, as a fraction: two runs of the same product differ by as much."""

_MARK = "hf_sparse_runtime_by_columns"


def vocabulary_of(model: nn.Module) -> nn.Linear | None:
    """Return the layer that multiplies with the vocabulary of a model that generates, if its layout can be changed."""
    can, head = getattr(model, "can_generate", None), getattr(model, "get_output_embeddings", None)
    if not callable(can) or not can() or not callable(head):
        return None
    layer = head()
    if type(layer) is not nn.Linear or "forward" in vars(layer) or parametrize.is_parametrized(layer):
        return None
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return layer if plain and min(weight.shape) > 1 else None


@torch.no_grad()
def races_by_columns(layer: nn.Linear, table: SpeedTable, tokens: Iterable[int] = TOKENS) -> dict[int, Race]:
    """Return what the layer takes by rows ("dense") and by columns ("packed"), by tokens."""
    by_rows = layer.weight.detach()
    by_columns = _by_columns(by_rows)
    races = {}
    for count in tokens:
        x = torch.randn(count, layer.in_features)
        trial = Trial(KERNEL, (tuple(by_rows.shape),), 0, (0,), count)
        races[count] = table.race(trial, _product(x, by_rows, layer.bias), _product(x, by_columns, layer.bias))
    return races


def pays(races: dict[int, Race]) -> bool:
    """Return whether the least number of tokens gains, and no other loses."""
    return races[min(races)].won and all(race.gain >= 1.0 - LOSS for race in races.values())


def lay_by_columns(model: nn.Module, layer: nn.Linear) -> None:
    """Change the layout in place; whatever shares the parameter shares the layout."""
    layer.weight.data = _by_columns(layer.weight.detach())
    vars(model)[_MARK] = True
    model.register_state_dict_post_hook(_rows_in_state)


def lay_by_rows(model: nn.Module) -> None:
    """Undo `lay_by_columns`, where it was done."""
    if vars(model).pop(_MARK, False):
        layer: Any = model.get_output_embeddings()  # type: ignore[operator]
        layer.weight.data = layer.weight.detach().contiguous()
        for key in [key for key, hook in model._state_dict_hooks.items() if hook is _rows_in_state]:
            del model._state_dict_hooks[key]


def _rows_in_state(_model: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    copies: dict[int, Tensor] = {}  # tied names go on sharing one tensor, or it would be saved twice
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.is_contiguous():
            state[name] = copies.setdefault(value.data_ptr(), value.detach().contiguous())


def _by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], object]:
    return lambda: F.linear(x, weight, bias)
