"""Low rank: two thin matrices for what pruning removes, or for the whole weight, fitted to the inputs of the layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ...config.sparsity import COMPRESSIONS
from ...errors import RecipeError
from ...modeling.forms import add_low_rank, embedding_scale, low_rank_like, plain_weight, replace_layer, size_of
from ...modeling.layer_kinds import MatrixLayer, is_linear
from ...utils.validation import check_bool, check_number, check_positive_int
from .base import Compression

_ROWS = 1 << 13


@COMPRESSIONS.register("low_rank")
@dataclasses.dataclass
class LowRank(Compression):
    """Approximate what is removed by `U V` of a rank, with the least error of the layer's outputs on calibration data.

    With a sparsity, `W ~ S + U V`: S is pruned as without it, and U V stands for the rest. Without one, `W ~ U V`. The
    inputs of embeddings are tokens, so a row counts as often as its token occurs; a tied LM head has the same U and V.

    Args:
        rank: columns of U and rows of V; at most the smaller side of a layer.
        weighted: whether errors count by the inputs of the layer (`‖(R - U V) X‖²`), or all entries alike:
            then `W ~ U V` needs no data, and a training can begin with it.
        damping: of the mean of the diagonal of `X Xᵀ`, added to it.

    Example:
        >>> import torch
        >>> down, up = LowRank(rank=1, damping=0.0).fit(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2))
        >>> (up @ down).round(decimals=4).abs().tolist()
        [[2.0, 0.0], [0.0, 0.0]]

    Source: Eckart and Young 1936; with the inputs as weights Wang et al. 2024, "SVD-LLM", section 3.1; beside a sparse
    weight Zhang and Papyan 2024, "OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition", section 2.
    """

    form = "low_rank"
    fits_inputs = True
    goes_beside = True
    rank: int = 16
    weighted: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_bool("weighted", self.weighted)
        check_number("damping", self.damping, "[0, inf)")
        self.needs_inputs = self.weighted

    def check(self, layer: nn.Module, name: str) -> None:
        super().check(layer, name)
        if self.rank > min(size_of(layer)):
            raise RecipeError(
                f"`rank` must be at most the smaller side of a layer, got {self.rank} for '{name}' of "
                f"{size_of(layer)}; lower it, or exclude the layer"
            )
        if isinstance(layer, nn.Embedding):
            embedding_scale(layer, f"'{name}'")

    def check_beside(self, layer: nn.Module, name: str) -> None:
        if not is_linear(layer):
            raise RecipeError(
                f"'{name}' is a {type(layer).__name__}: low rank beside a sparse weight is for linear layers. Exclude "
                "it, or leave `sparsity` out for low rank alone"
            )

    def fit(self, weight: Tensor, products: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return V, `(rank, in)`, and U, `(out, rank)`, whose product is nearest to a weight.

        With `H = C Cᵀ`, the error `‖(R - U V) C‖²` is least for the first singular vectors P and Q of `R C`: U = P √s
        and V = √s Qᵀ C⁻¹.

        Args:
            weight: R, `(out, in)`.
            products: H, `(in, in)`; None = all entries alike.
        """
        root = None if products is None or not self.weighted else self._root(products)
        left, values, right = torch.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
        scale = values[: self.rank].sqrt()
        up, down = left[:, : self.rank] * scale, scale[:, None] * right[: self.rank]
        if root is not None:  # down @ inverse(root)
            down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
        return down, up

    def _root(self, products: Tensor) -> Tensor:
        """Return a lower triangular C with `C Cᵀ = H`, with as much damping as that takes."""
        mean = float(products.diagonal().mean()) or 1.0
        for damping in (self.damping, 0.01, 0.1, 1.0):
            damped = products.clone()
            damped.diagonal().add_(max(damping, 0.0) * mean)
            root, info = torch.linalg.cholesky_ex(damped)
            if not int(info) and bool(root.isfinite().all()):
                return root
        return torch.eye(len(products), dtype=products.dtype, device=products.device)

    def add_fitted(self, layer: MatrixLayer, removed: Tensor, products: Tensor) -> Tensor:
        down, up = self.fit(removed, products)
        add_low_rank(layer, down, up)
        return up @ down

    def fit_table(self, table: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return V, `(rank, width)`, and U, `(tokens, rank)`, with the least `sum_i (n_i + d) ‖E_i - U_i V‖²`.

        The rows of V are the first eigenvectors of `Eᵀ diag(n + d) E`, and U is `E Vᵀ`: no table is decomposed.

        Args:
            table: E, `(tokens, width)`.
            counts: n, how often each token occurs, `(tokens,)`; None = all alike. d is the damping of their mean.
        """
        counts = torch.ones_like(table[:, 0]) if counts is None else counts.to(table.dtype)
        rows = counts + self.damping * (float(counts.mean()) or 1.0)
        products = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
        for part, times in zip(table.split(_ROWS), rows.split(_ROWS), strict=True):
            products += (part.t() @ (part * times[:, None])).double()
        vectors = torch.linalg.eigh(products).eigenvectors.flip(1)[:, : self.rank].to(table.dtype)
        return vectors.t().contiguous(), table @ vectors

    def replace(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        self._put(model, name, layer, None)

    def replace_fitted(self, model: nn.Module, name: str, layer: MatrixLayer, products: Tensor) -> Tensor:
        return self._put(model, name, layer, products)

    @torch.no_grad()
    def _put(self, model: nn.Module, name: str, layer: nn.Module, products: Tensor | None) -> Tensor:
        weight = plain_weight(layer)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        fit = self.fit_table if isinstance(layer, nn.Embedding) else self.fit
        down, up = fit(weight, products if self.weighted else None)
        new = low_rank_like(layer, self.rank)
        new.down.copy_(down)
        new.up.copy_(up)
        replace_layer(model, name, new)
        return up @ down
