"""Merging of experts: those that do alike become one, weighted by how many tokens the router gives to each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..formats.structure import Edits
from ..modeling.architectures import ExpertBlock
from ..utils.validation import check_number
from .experts import Meter, drop_experts, experts_of, run_meters
from .selection import kept_count


@torch.no_grad()
def merge_experts(model: nn.Module, batches: Iterable[Mapping[str, Any]], sparsity: float) -> Edits:
    """Merge the experts of each mixture that do alike on data, in place, and return what is left.

    Experts are clustered by the mean of their outputs over all tokens (hierarchical clustering, average linkage). The
    weights of a cluster become their mean, weighted by how many tokens the router gave to each, once their neurons are
    in the order of the one with the most tokens. Their rows of the router are averaged with the same weights. (The
    papers keep all rows and let those of a cluster lead to one expert; here what is left is a plain smaller model.)

    Args:
        model: with mixtures of experts of a family that is known.
        batches: keyword arguments of the model; no labels are needed. Padding is left out where a batch has an
            `attention_mask`.
        sparsity: fraction of the experts that are to disappear, in [0, 1).

    Raises:
        PatternError: if the model has no experts that are known.
        RecipeError: if fewer experts would be left than a token needs. The model is then as it was.
        SparsityError: if there is no batch.

    Example:
        >>> import hf_sparse
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=10, num_hidden_layers=1, num_local_experts=4, **sizes))
        >>> _ = hf_sparse.merge_experts(model, [{"input_ids": torch.tensor([[1, 2, 3]])}], sparsity=0.5)
        >>> model.config.num_local_experts
        2

    Source: Chen et al. 2024, "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering" (HC-SMoE), sections
        3.2 and 3.3; weights by frequency and the order of neurons of Li et al. 2024, "Merge, Then Compress: Demystify
        Efficient SMoE with Hints from Its Routing Policy" (M-SMoE), section 3.1.
    """
    check_number("sparsity", sparsity, "[0, 1)")
    blocks = experts_of(model, "merging experts")
    counts = {block.name: kept_count(block.groups, sparsity) for block in blocks}
    for block in blocks:
        if counts[block.name] < block.top_k:
            raise RecipeError(
                f"sparsity {sparsity:g} leaves {counts[block.name]} of the {block.groups} experts of '{block.name}', "
                f"which gives each token to {block.top_k}: lower the sparsity"
            )
    meters = [_Likeness(block) for block in blocks]
    run_meters(model, batches, meters)
    kept = {}
    for meter in meters:
        name, frequency = meter.block.name, meter.frequency
        clusters = clustered(meter.sums, counts[name])
        leaders = [max(cluster, key=lambda expert: (float(frequency[expert]), -expert)) for cluster in clusters]
        for leader, cluster in zip(leaders, clusters, strict=True):
            _merge(meter.block, leader, cluster, frequency)
        kept[name] = sorted(leaders)
    return drop_experts(model, kept)


class _Likeness(Meter):
    """Adds up what every expert makes of every token, and counts the tokens that the router gives to each.

    Attributes:
        sums: of outputs, `(experts, hidden)`.
        frequency: tokens of each expert.
    """

    def __init__(self, block: ExpertBlock) -> None:
        super().__init__(block)
        self.frequency = torch.zeros(block.groups, dtype=torch.float64)
        self.sums: Tensor = torch.zeros(())

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self.frequency += torch.bincount(index.flatten().cpu(), minlength=len(self.frequency))
        every = [
            self.outputs(hidden, torch.full((len(hidden),), expert, device=hidden.device)).double().sum(0).cpu()
            for expert in range(self.block.groups)
        ]
        self.sums = self.sums + torch.stack(every)


def clustered(points: Tensor, count: int) -> list[list[int]]:
    """Return which points are in each of some clusters, by hierarchical clustering with average linkage.

    Example:
        >>> clustered(torch.tensor([[0.0], [5.0], [0.1], [5.3]]), 2)
        [[0, 2], [1, 3]]
    """
    from scipy.cluster.hierarchy import cut_tree, linkage  # a second of import, for this alone

    if count == len(points):
        return [[index] for index in range(count)]
    labels = cut_tree(linkage(points.numpy(), method="average"), n_clusters=count)[:, 0]
    return [[index for index, label in enumerate(labels) if label == own] for own in sorted(set(labels.tolist()))]


def _merge(block: ExpertBlock, leader: int, cluster: Sequence[int], frequency: Tensor) -> None:
    """Put the weighted mean of a cluster in the place of its leader."""
    if len(cluster) == 1:
        return
    total = float(frequency[list(cluster)].sum())
    shares = {expert: float(frequency[expert]) / total if total else 1 / len(cluster) for expert in cluster}
    wide, narrow = (block.experts.get_parameter(name) for name in block.table.parameters)
    orders = {expert: neuron_order(wide, narrow, leader, expert) for expert in cluster}
    size = narrow.shape[-1]
    for parameter, dimension in ((wide, 0), (narrow, 1)):
        mean = torch.zeros_like(parameter[leader], dtype=torch.float64)
        for expert, share in shares.items():
            order = orders[expert]
            if dimension == 0:  # the rows of gates, then those of what they gate
                order = torch.cat([order + start for start in range(0, parameter.shape[1], size)])
            mean += share * parameter[expert].index_select(dimension, order.to(parameter.device)).double()
        parameter.data[leader] = mean.to(parameter.dtype)
    rows = block.router.weight
    rows.data[leader] = sum(share * rows[expert].double() for expert, share in shares.items()).to(rows.dtype)


def neuron_order(wide: Tensor, narrow: Tensor, leader: int, expert: int) -> Tensor:
    """Return the neurons of an expert in the order in which they are most like those of another.

    Args:
        wide: rows of gates and of what they gate, of all experts.
        narrow: columns that read the neurons, of all experts.

    Shapes: wide `(experts, 2 neurons, hidden)`, narrow `(experts, hidden, neurons)`.

    Source: Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", section 3.2.
    """
    from scipy.optimize import linear_sum_assignment

    size = narrow.shape[-1]
    if expert == leader:
        return torch.arange(size)

    def features(number: int) -> Tensor:
        return torch.cat([*wide[number].float().split(size), narrow[number].float().t()], dim=1)

    likeness = features(leader) @ features(expert).t()
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])
