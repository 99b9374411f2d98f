"""Layers whose weights share a few values: which one, and with which sign, a hash of row and column says.

Only the values are stored. The matrix is computed some rows at a time, in the forward and again in the backward pass,
so that it is never in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...errors import CheckpointError, RecipeError
from ...utils.validation import check_integer, check_positive_int
from ..layer_kinds import is_linear, matrix_shape, oriented
from .base import Form, register_form, size_of
from .embedding_scale import embedding_scale
from .hashing import MAX_BUCKETS, column_keys, row_keys, slots

_CHUNK = 1 << 16
"""Entries of the matrix that are computed at once: as many as stay in the cache of a core."""


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    height = max(1, _CHUNK // max(1, columns))
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _signed(buckets: Tensor) -> Tensor:
    """Return the value of each slot."""
    return torch.cat((buckets, -buckets))


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return the value of each entry; `index_select` is four times as fast here as indexing."""
    return values.index_select(0, index.view(-1)).view_as(index)


def _folded(sums: Tensor) -> Tensor:
    """Return sums over buckets of sums over slots."""
    positive, negative = sums.chunk(2)
    return positive - negative


def _accumulator(buckets: Tensor) -> Tensor:
    """Return zeros to sum gradients of slots in; float32 at least, since there are many of them."""
    kind = torch.float64 if buckets.dtype == torch.float64 else torch.float32
    return torch.zeros(2 * buckets.numel(), dtype=kind, device=buckets.device)


class _Linear(torch.autograd.Function):
    """`x V^T` for the hashed matrix V."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buckets: Tensor, rows: int, columns: int, seed: int) -> Tensor:
        ctx.save_for_backward(x, buckets)
        ctx.shape = rows, columns, seed
        row, column = _keys(rows, columns, seed, x.device)
        values, flat = _signed(buckets), x.reshape(-1, columns)
        out = x.new_empty(flat.shape[0], rows)
        for part in _chunks(rows, columns):
            out[:, part] = flat @ _taken(values, slots(row[part], column, buckets.numel())).to(x.dtype).t()
        return out.view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, buckets = ctx.saved_tensors
        rows, columns, seed = ctx.shape
        row, column = _keys(rows, columns, seed, x.device)
        flat, gradient = x.reshape(-1, columns), gradient.reshape(-1, rows)
        to_x, to_buckets = ctx.needs_input_grad[:2]
        x_gradient = torch.zeros_like(flat) if to_x else None
        values, sums = _signed(buckets), _accumulator(buckets)
        for part in _chunks(rows, columns):
            index, above = slots(row[part], column, buckets.numel()), gradient[:, part]
            if x_gradient is not None:
                x_gradient.addmm_(above, _taken(values, index).to(x.dtype))
            if to_buckets:
                sums.scatter_add_(0, index.view(-1), (above.t() @ flat).to(sums.dtype).view(-1))
        bucket_gradient = _folded(sums).to(buckets.dtype) if to_buckets else None
        return None if x_gradient is None else x_gradient.view_as(x), bucket_gradient, None, None, None


class _Lookup(torch.autograd.Function):
    """Rows of a hashed matrix."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, buckets: Tensor, columns: int, seed: int, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, buckets)
        ctx.shape = columns, seed, padding
        index = _slots_of(ids.reshape(-1), columns, seed, buckets.numel())
        out = _taken(_signed(buckets), index).view(*ids.shape, columns)
        return out if padding is None else out.masked_fill_((ids == padding)[..., None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ids, buckets = ctx.saved_tensors
        columns, seed, padding = ctx.shape
        sums, rows = _accumulator(buckets), gradient.reshape(-1, columns).to(_accumulator(buckets[:0]).dtype)
        if padding is not None:
            rows = rows.masked_fill((ids == padding).reshape(-1, 1), 0)
        sums.scatter_add_(0, _slots_of(ids.reshape(-1), columns, seed, buckets.numel()).view(-1), rows.reshape(-1))
        return None, _folded(sums).to(buckets.dtype), None, None, None


def _keys(rows: int, columns: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        row_keys(torch.arange(rows, device=device), seed),
        column_keys(torch.arange(columns, device=device), seed),
    )


def _slots_of(ids: Tensor, columns: int, seed: int, buckets: int) -> Tensor:
    return slots(row_keys(ids.long(), seed), column_keys(torch.arange(columns, device=ids.device), seed), buckets)


class _Hashed(nn.Module):
    """What hashed layers share: values, seed and shape."""

    buckets: nn.Parameter

    def __init__(self, rows: int, columns: int, buckets: int, seed: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        for key, value in (("rows", rows), ("columns", columns), ("buckets", buckets)):
            check_positive_int(key, value)
        check_integer("buckets", buckets, f"[1, {min(rows * columns, MAX_BUCKETS)}]")
        check_integer("seed", seed, f"[0, {1 << 63})")
        self.shape, self.seed = (rows, columns), seed
        self.buckets = nn.Parameter(torch.empty(buckets, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """The matrix, computed: a dense copy, changes of which are lost. Differentiable by the buckets."""
        row, column = _keys(*self.shape, self.seed, self.buckets.device)
        return _taken(_signed(self.buckets), slots(row, column, self.buckets.numel()))

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Set each bucket to the mean of its entries of a matrix, with their signs: the nearest hashed matrix.

        Args:
            weight: `(rows, columns)`. A bucket without entries becomes 0.
        """
        (rows, columns), (row, column) = self.shape, _keys(*self.shape, self.seed, weight.device)
        sums = torch.zeros(2 * self.buckets.numel(), dtype=torch.float64, device=weight.device)
        counts = torch.zeros_like(sums)
        for part in _chunks(rows, columns):
            index = slots(row[part], column, self.buckets.numel()).view(-1)
            sums.scatter_add_(0, index, weight[part].reshape(-1).double())
            counts.scatter_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        self.buckets.copy_(_folded(sums) / (counts[: len(counts) // 2] + counts[len(counts) // 2 :]).clamp_min(1))


class HashedLinear(_Hashed):
    """A linear layer with `buckets` different weights: `W_ij = sign(i, j) buckets[h(i, j)]`.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        buckets: how many values are stored, from 1 to the size of the matrix.
        seed: of the hash.

    Raises:
        RecipeError: for sizes or a seed that cannot be.

    Example:
        >>> layer = HashedLinear(64, 32, buckets=256, seed=1)
        >>> layer(torch.ones(2, 64)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 32]), 288)

    Source: Chen et al. 2015, "Compressing Neural Networks with the Hashing Trick", section 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        buckets: int,
        seed: int = 0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(out_features, in_features, buckets, seed, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as `nn.Linear` of this shape does."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.buckets, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + bias`."""
        out = cast(Tensor, _Linear.apply(x, self.buckets, *self.shape, self.seed))  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Return sizes for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, buckets={self.buckets.numel()}"


class HashedEmbedding(_Hashed):
    """An embedding table with `buckets` different values. The row of `padding_idx` is zero and has no gradient.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in `nn.Embedding`.
        buckets, seed: as in `HashedLinear`.
        scale: factor of what is looked up.

    Example:
        >>> HashedEmbedding(1000, 16, buckets=2000)(torch.tensor([[1, 999]])).shape
        torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        buckets: int,
        seed: int = 0,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, buckets, seed, device, dtype)
        self.scale = scale
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        nn.init.normal_(self.buckets)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids."""
        arguments = (ids, self.buckets, self.embedding_dim, self.seed, self.padding_idx)
        found = cast(Tensor, _Lookup.apply(*arguments))  # type: ignore[no-untyped-call]
        return found if self.scale == 1.0 else found * self.scale

    def extra_repr(self) -> str:
        """Return sizes for `print`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, buckets={self.buckets.numel()}"


def hashed_like(layer: nn.Module, buckets: int, seed: int) -> HashedLinear | HashedEmbedding:
    """Return a hashed layer in the place of a linear layer or an embedding, with its bias and random buckets."""
    weight = cast(Tensor, layer.weight)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Embedding):
        scale = embedding_scale(layer)
        return HashedEmbedding(*size_of(layer), buckets, seed, layer.padding_idx, scale=scale, **place)
    assert is_linear(layer)
    rows, columns = matrix_shape(layer)
    new = HashedLinear(columns, rows, buckets, seed, layer.bias is not None, **place)
    new.bias = layer.bias  # the parameter itself
    new.buckets.requires_grad_(weight.requires_grad)
    return new


def plain_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as `(out, in)`, or the table of an embedding."""
    return oriented(layer, cast(Tensor, layer.weight).detach())


def _read(module: nn.Module) -> dict[str, int] | None:
    if not isinstance(module, _Hashed):
        return None
    rows, columns = module.shape
    return {"rows": rows, "columns": columns, "buckets": module.buckets.numel(), "seed": module.seed}


def _build(layer: nn.Module, facts: Mapping[str, int]) -> nn.Module:
    try:
        return hashed_like(layer, facts["buckets"], facts["seed"])
    except RecipeError as error:
        raise CheckpointError(f"a hashed layer of the checkpoint cannot be: {error}") from None


register_form(Form("hashed", ("buckets", "seed"), _read, _build, parts=("buckets",)))
