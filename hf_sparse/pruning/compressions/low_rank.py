"""Low rank: two thin matrices for what pruning removes, or for the whole weight, fitted to the inputs of the layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ...config.sparsity import COMPRESSIONS
from ...errors import RecipeError
from ...modeling.forms import add_low_rank, low_rank_like, put_layer
from ...modeling.layer_kinds import MatrixLayer, is_linear, matrix_shape, oriented
from ...utils.validation import check_bool, check_number, check_positive_int
from .base import Compression


@COMPRESSIONS.register("low_rank")
@dataclasses.dataclass
class LowRank(Compression):
    """Approximate what is removed by `U V` of a rank, with the least error of the layer's outputs on calibration data.

    With a sparsity, `W ~ S + U V`: S is pruned as without it, and U V stands for the rest. Without one, `W ~ U V`.

    Args:
        rank: columns of U and rows of V; at most the smaller side of a layer.
        weighted: whether errors count by the inputs of the layer (`‖(R - U V) X‖²`), or all entries alike.
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
    needs_inputs = True
    goes_beside = True
    rank: int = 16
    weighted: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_bool("weighted", self.weighted)
        check_number("damping", self.damping, "[0, inf)")

    def check(self, layer: nn.Module, name: str) -> None:
        if not is_linear(layer):
            raise RecipeError(f"'{name}' is a {type(layer).__name__}, which has no inputs to fit to; exclude it")
        if self.rank > min(matrix_shape(layer)):
            raise RecipeError(
                f"`rank` must be at most the smaller side of a layer, got {self.rank} for '{name}' of "
                f"{matrix_shape(layer)}; lower it, or exclude the layer"
            )

    def fit(self, weight: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Return V, `(rank, in)`, and U, `(out, rank)`, whose product is nearest to a weight.

        With `H = C Cᵀ`, the error `‖(R - U V) C‖²` is least for the first singular vectors P and Q of `R C`: U = P √s
        and V = √s Qᵀ C⁻¹.

        Args:
            weight: R, `(out, in)`.
            products: H, `(in, in)`.
        """
        root = self._root(products) if self.weighted else None
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

    def replace_fitted(self, model: nn.Module, name: str, layer: MatrixLayer, products: Tensor) -> Tensor:
        weight = oriented(layer, layer.weight.detach()).to(products.dtype)
        down, up = self.fit(weight, products)
        new = low_rank_like(layer, self.rank)
        with torch.no_grad():
            new.down.copy_(down)
            new.up.copy_(up)
        put_layer(model, name, new)
        return up @ down
