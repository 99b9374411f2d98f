"""Spectral sparsification: a layer as a graph of its inputs and outputs, and how much each edge holds it together."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...config.sparsity import SCORERS
from .base import Scorer


@SCORERS.register("effective_resistance")
@dataclasses.dataclass
class EffectiveResistance(Scorer):
    """Score an entry by the leverage `|W_ij| R_ij`, in [0, 1], R the effective resistance of output i to input j.

    The graph has an edge of weight `|W_ij|` for each entry. Its Laplacian L has the pseudo-inverse P, and
    `R_ij = P_ii + P_jj - 2 P_ij`. An edge without which the graph falls apart has leverage 1. The paper draws edges
    with these probabilities and raises their weights; here those with the highest are kept, as they are.

    It takes the inverse of a matrix of outputs and inputs together (3840 for the feed-forward layers of BERT-base):
    renew masks seldom (`every` of the schedule), or prune in one shot.

    Example:
        >>> import torch
        >>> EffectiveResistance().element_scores(torch.ones(2, 2))  # a ring of four edges: 1 beside 3 in series
        tensor([[0.7500, 0.7500],
                [0.7500, 0.7500]])

    Source: Spielman and Srivastava 2011, "Graph Sparsification by Effective Resistances", sections 1 and 3.
    """

    def element_scores(self, weight: Tensor) -> Tensor:
        edges = weight.detach().abs().double().reshape(weight.shape[0], -1)
        if not bool(edges.isfinite().all()):  # NaN is for the selection to find, and has no inverse
            return weight.detach().abs().float() * torch.nan
        scale = edges.amax()
        if not float(scale):
            return torch.zeros_like(weight, dtype=torch.float32)
        edges = edges / scale  # leverage does not depend on it
        inverse = _pseudo_inverse(edges)
        rows = len(edges)
        here, there = inverse.diagonal()[:rows, None], inverse.diagonal()[rows:]
        resistance = here + there - 2 * inverse[:rows, rows:]
        return (edges * resistance).clamp(0.0, 1.0).float().view(weight.shape)


def _pseudo_inverse(edges: Tensor) -> Tensor:
    """Return the pseudo-inverse of the Laplacian of a bipartite graph."""
    rows, columns = edges.shape
    size = rows + columns
    laplacian = edges.new_zeros(size, size)
    laplacian[:rows, rows:] = -edges
    laplacian[rows:, :rows] = -edges.t()
    laplacian.diagonal().copy_(torch.cat((edges.sum(1), edges.sum(0))))
    if bool((edges > 1e-9).all()):
        # Connected, so the constant is the only vector without energy: (L + 11ᵀ/n)⁻¹ = L⁺ + 11ᵀ/n.
        root, failed = torch.linalg.cholesky_ex(laplacian + 1.0 / size)
        if not int(failed):
            return torch.cholesky_inverse(root) - 1.0 / size
    return torch.linalg.pinv(laplacian, hermitian=True)
