"""Layers with two thin matrices: `U V` beside a (sparse) weight, or in its place. They are never multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import CheckpointError, RecipeError
from ..layer_kinds import is_linear, matrix_shape
from .base import Form, register_form, size_of
from .embedding_scale import embedding_scale


class LowRankPart(nn.Module):
    """`U (V x)`: what a layer adds to its own outputs, as its child `low_rank`.

    Args:
        down: V, `(rank, in)`, as `lora_A` of PEFT.
        up: U, `(out, rank)`, as `lora_B`.
    """

    def __init__(self, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added."""
        return functional.linear(functional.linear(x, self.down), self.up)


def _add(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add the low-rank part: a forward hook, so that the layer stays what it is for masks, kernels and adapters."""
    added: Tensor = layer.low_rank(args[0])
    return output + added


class LowRankLinear(nn.Module):
    """A linear layer that is `U (V x) + bias`.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        rank: columns of U and rows of V.

    Example:
        >>> layer = LowRankLinear(16, 8, rank=2)
        >>> layer(torch.ones(3, 16)).shape, layer.weight.shape
        (torch.Size([3, 8]), torch.Size([8, 16]))
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, in_features, **place))
        self.up = nn.Parameter(torch.empty(out_features, rank, **place))
        self.bias = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        for part in (self.down, self.up):
            nn.init.kaiming_uniform_(part, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        """The product, a dense copy."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """Return `U (V x) + bias`."""
        return functional.linear(functional.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """Return sizes for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.down.shape[0]}"


class LowRankEmbedding(nn.Module):
    """An embedding table that is `U V`: a thin table, and a matrix that makes its rows as wide as the model.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in `nn.Embedding`.
        rank: columns of U and rows of V.
        scale: factor of what is looked up.

    Example:
        >>> table = LowRankEmbedding(1000, 64, rank=8)
        >>> table(torch.tensor([[1, 999]])).shape, sum(p.numel() for p in table.parameters())
        (torch.Size([1, 2, 64]), 8512)

    Source: Lan et al. 2020, "ALBERT", section 3.1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scale = scale
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, embedding_dim, **place))
        self.up = nn.Parameter(torch.empty(num_embeddings, rank, **place))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        nn.init.normal_(self.up)

    @property
    def weight(self) -> Tensor:
        """The product, a dense copy."""
        return self.up @ self.down

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids."""
        rows = functional.embedding(ids, self.up, self.padding_idx) @ self.down
        return rows if self.scale == 1.0 else rows * self.scale

    def extra_repr(self) -> str:
        """Return sizes for `print`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.down.shape[0]}"


def is_low_rank(layer: nn.Module) -> bool:
    """Return whether a layer has a low-rank part beside its weight."""
    return isinstance(layer._modules.get("low_rank"), LowRankPart)


def add_low_rank(layer: nn.Module, down: Tensor, up: Tensor) -> None:
    """Put a low-rank part beside the weight of a layer, in place; one that is there is replaced.

    Args:
        down: `(rank, in)`.
        up: `(out, rank)`.
    """
    weight = cast(Tensor, layer.weight)
    parts = [
        nn.Parameter(part.to(weight.dtype).contiguous(), requires_grad=weight.requires_grad) for part in (down, up)
    ]
    if not is_low_rank(layer):
        layer.register_forward_hook(_add)
    layer.low_rank = LowRankPart(*parts)


def low_rank_like(layer: nn.Module, rank: int) -> LowRankLinear | LowRankEmbedding:
    """Return a layer of two thin matrices in the place of a linear layer or an embedding, with its bias and any values.

    Raises:
        RecipeError: for an embedding that computes something else beside the look-up.
    """
    weight = cast(Tensor, layer.weight)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    new: LowRankLinear | LowRankEmbedding
    if isinstance(layer, nn.Embedding):
        new = LowRankEmbedding(*size_of(layer), rank, layer.padding_idx, scale=embedding_scale(layer), **place)
    else:
        assert is_linear(layer)
        rows, columns = matrix_shape(layer)
        new = LowRankLinear(columns, rows, rank, layer.bias is not None, **place)
        new.bias = layer.bias
    for part in (new.down, new.up):
        part.requires_grad_(weight.requires_grad)
    return new


def _read_added(module: nn.Module) -> dict[str, int] | None:
    part = module._modules.get("low_rank")
    if not isinstance(part, LowRankPart):
        return None
    return {"rows": part.up.shape[0], "columns": part.down.shape[1], "rank": part.down.shape[0]}


def _build_added(layer: nn.Module, facts: Mapping[str, int]) -> nn.Module:
    if not is_linear(layer):
        raise CheckpointError(f"a {type(layer).__name__} cannot have a low-rank part beside its weight")
    rank, weight = _rank(layer, facts), layer.weight
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    add_low_rank(layer, torch.empty(rank, facts["columns"], **place), torch.empty(facts["rows"], rank, **place))
    return layer


def _read_alone(module: nn.Module) -> dict[str, int] | None:
    if not isinstance(module, LowRankLinear | LowRankEmbedding):
        return None
    return {"rows": module.up.shape[0], "columns": module.down.shape[1], "rank": module.down.shape[0]}


def _build_alone(layer: nn.Module, facts: Mapping[str, int]) -> nn.Module:
    try:
        return low_rank_like(layer, _rank(layer, facts))
    except RecipeError as error:
        raise CheckpointError(f"a low-rank layer of the checkpoint cannot be: {error}") from None


def _rank(layer: nn.Module, facts: Mapping[str, int]) -> int:
    if not 1 <= facts["rank"] <= min(facts["rows"], facts["columns"]):
        raise CheckpointError(
            f"a {type(layer).__name__} of {facts['rows']} x {facts['columns']} cannot have rank {facts['rank']}"
        )
    return facts["rank"]


register_form(Form("sparse_low_rank", ("rank",), _read_added, _build_added, beside=("low_rank.down", "low_rank.up")))
register_form(Form("low_rank", ("rank",), _read_alone, _build_alone, parts=("down", "up")))
