"""Experts: which of a mixture matter, measured on data, and a model without the others.

An expert that is removed takes its row of the router with it, so the tokens that it had go to the next best. Zeros
would not do that: the router would still choose it. So there is no mask for experts, and what is removed is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.sparsity import SELECTIONS
from ..errors import PatternError, RecipeError, SparsityError
from ..formats.structure import KINDS, Cut, Edits
from ..modeling.architectures import FAMILIES, ExpertBlock, known_experts
from ..utils.validation import check_batches, check_number
from .compaction import cut_experts, edits_of, settle_edits
from .even_cuts import Cuts
from .selection import kept_count


@torch.no_grad()
def expert_saliency(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the router-weighted activation of each expert (REAP), by name of the mixture.

    It is the mean, over the tokens that the router gives to the expert, of its router weight times the norm of its
    output: `S_j = 1/|X_j| sum_{x in X_j} g_j(x) ||f_j(x)||_2`. An expert without tokens has 0.

    Padding is left out where a batch has an `attention_mask`. The model runs as in evaluation.

    Args:
        model: with mixtures of experts of a family that is known.
        batches: keyword arguments of the model.

    Raises:
        PatternError: if the model has no experts that are known.
        SparsityError: if there is no batch.

    Shapes: one number for each expert.

    Source: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", equation 9.
    """
    meters = [_Saliency(block) for block in experts_of(model, "expert saliency")]
    run_meters(model, batches, meters)
    return {meter.block.name: (meter.sums / meter.counts.clamp_min(1)).float() for meter in meters}


class Meter:
    """A hook on the experts of a mixture that is given its tokens, without padding.

    Attributes:
        real: which tokens of the batch are not padding; None = all.
    """

    def __init__(self, block: ExpertBlock) -> None:
        self.block = block
        self.real: Tensor | None = None
        self.handle = block.experts.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        hidden, index, weights = (*inputs, *(named[name] for name in names[len(inputs) :]))
        if self.real is not None and len(self.real) == len(hidden):
            real = self.real.to(hidden.device)
            hidden, index, weights = hidden[real], index[real], weights[real]
        self.add(hidden, index, weights)

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Take tokens, and the experts of each with their router weights."""
        raise NotImplementedError

    def outputs(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Return what one expert each makes of tokens."""
        alone = experts.reshape(-1, 1)
        out: Tensor = self.block.experts.forward(hidden, alone, torch.ones_like(alone, dtype=hidden.dtype))
        return out


class _Saliency(Meter):
    """Adds up what each expert contributes to its tokens."""

    def __init__(self, block: ExpertBlock) -> None:
        super().__init__(block)
        self.sums = torch.zeros(block.groups, dtype=torch.float64)
        self.counts = torch.zeros(block.groups, dtype=torch.float64)

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        # Each pair of token and expert as a token of its own with that one expert, whose output is then not summed.
        out = self.outputs(hidden.repeat_interleave(index.shape[1], 0), index)
        values = weights.reshape(-1).double() * out.double().norm(dim=-1)
        self.sums.index_add_(0, index.flatten().cpu(), values.cpu())
        self.counts += torch.bincount(index.flatten().cpu(), minlength=len(self.counts))


def run_meters(model: nn.Module, batches: Iterable[Mapping[str, Any]], meters: Sequence[Meter]) -> None:
    """Run a model on batches, as in evaluation, and remove the meters.

    Raises:
        SparsityError: if there is no batch.
    """
    training, seen = model.training, 0
    model.eval()
    try:
        check_batches(batches)
        for batch in batches:
            mask = batch.get("attention_mask")
            for meter in meters:
                meter.real = None if mask is None or mask.ndim != 2 else mask.bool().flatten()
            model(**batch)
            seen += 1
    finally:
        model.train(training)
        for meter in meters:
            meter.handle.remove()
    if not seen:
        raise SparsityError("what experts do is measured on data, and there was no batch")


@torch.no_grad()
def drop_experts(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> Edits:
    """Remove experts from a model, in place, each with its row of the router, and return what is left.

    Where every mixture keeps equally many, the config is changed (`num_experts`), and the model is a plain one of its
    class. Otherwise it is saved packed with its edits, as after `compact`; the auxiliary loss of the router, which adds
    up all mixtures, then does not work.

    Args:
        kept: by name of the mixture, the numbers of the experts that stay; mixtures that are not named keep all.

    Raises:
        PatternError: if the model has no experts that are known.
        RecipeError: for a name or a number that it does not have, or fewer experts than a token needs. The model is
            then as it was.
    """
    blocks = {block.name: block for block in experts_of(model, "removing experts")}
    for name, numbers in kept.items():
        if name not in blocks:
            raise RecipeError(f"the model has no experts in '{name}'; it has them in {', '.join(blocks)}")
        block = blocks[name]
        if sorted(set(numbers)) != sorted(numbers) or not set(numbers) <= set(range(block.groups)):
            raise RecipeError(f"'{name}' has experts 0 to {block.groups - 1}, got {sorted(numbers)}")
        if len(numbers) < block.top_k:
            raise RecipeError(
                f"'{name}' gives each token to {block.top_k} experts, so at least as many have to stay, got "
                f"{len(numbers)}"
            )
    cuts: Cuts = {kind: dict(getattr(edits_of(model), kind)) for kind in KINDS.values()}
    for name, numbers in kept.items():
        block, own = blocks[name], cuts[KINDS["experts"]]
        if len(numbers) < block.groups:
            own[name] = own.get(name, Cut.of(block.groups)).then(sorted(numbers))
            cut_experts(block, sorted(numbers))
    edits = Edits(**cuts)
    if edits:
        settle_edits(model, cuts)
    return edits


def prune_experts(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], sparsity: float, selection: str = "uniform"
) -> Edits:
    """Remove the experts that matter least on data (`expert_saliency`), in place, and return what is left.

    Args:
        batches: keyword arguments of the model; no labels are needed.
        sparsity: fraction of the experts to remove, in [0, 1).
        selection: "uniform" = of each mixture; "global" = of all together, but each keeps as many as a token needs.

    Raises:
        PatternError, RecipeError, SparsityError: as `expert_saliency` and `drop_experts`.

    Example:
        >>> import hf_sparse
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=10, num_hidden_layers=1, num_local_experts=4, **sizes))
        >>> _ = hf_sparse.prune_experts(model, [{"input_ids": torch.tensor([[1, 2, 3]])}], sparsity=0.25)
        >>> model.config.num_local_experts
        3
    """
    check_number("sparsity", sparsity, "[0, 1)")
    blocks = {block.name: block for block in experts_of(model, "removing experts")}
    scores = expert_saliency(model, batches)
    if selection == "global":
        for name, values in scores.items():  # what a token needs is never among the lowest
            values[values.topk(blocks[name].top_k).indices] = torch.inf
        total = sum(values.numel() for values in scores.values())
        if kept_count(total, sparsity) < sum(int(values.isinf().sum()) for values in scores.values()):
            raise RecipeError(f"sparsity {sparsity:g} would leave fewer experts than the tokens of the model need")
    chosen = SELECTIONS.build(selection).select(list(scores.values()), sparsity)
    kept = {name: mask.nonzero().flatten().tolist() for name, mask in zip(scores, chosen, strict=True)}
    return drop_experts(model, kept)


def experts_of(model: nn.Module, wanted: str) -> list[ExpertBlock]:
    """Return the mixtures of a model.

    Args:
        wanted: for the message: what needs them.

    Raises:
        PatternError: if there are none that are known.
        SparsityError: if they are not in memory.
    """
    blocks = known_experts(model)
    if not blocks:
        families = [family.name for family in FAMILIES.values() if family.experts]
        raise PatternError(
            f"{wanted} needs to know where the experts of a model are, and hf_sparse does not know that of "
            f"{type(model).__name__}. It knows {', '.join(families)}"
        )
    meta = next((block.name for block in blocks if block.router.weight.is_meta), None)
    if meta is not None:
        raise SparsityError(f"'{meta}' is not in memory (meta device). Load the whole model into memory first")
    return blocks
