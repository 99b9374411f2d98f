"""A unit: weights that share one mask. One weight alone, or the weights of all heads or neurons of a sub-block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.module_names import NamePattern
from ..errors import SparsityError
from ..modeling.architectures import match_sub_blocks
from ..modeling.layer_matching import match_layers
from .mask_state_dict import attach_mask, bake_mask
from .masked_weight import MaskedWeight, hidden, placed_as
from .patterns import Pattern, Structure
from .scorers import Scorer


@dataclasses.dataclass(frozen=True)
class Share:
    """One layer whose weight is to be a member of a unit.

    Attributes:
        name: of the layer in the model.
        layer: itself.
        pattern: which entries of its weight belong to a group.
        has_bias: whether its bias belongs to the groups too, one entry with each row.
    """

    name: str
    layer: nn.Linear
    pattern: Pattern
    has_bias: bool = False


@dataclasses.dataclass
class Member:
    """One masked weight of a unit; `name` is of the weight, `masked` the mask on it, the rest as in `Share`."""

    name: str
    module: nn.Module
    masked: MaskedWeight
    pattern: Pattern
    has_bias: bool = False


@dataclasses.dataclass
class Unit:
    """Weights that share one vector of groups.

    Attributes:
        members: at least one. The first is where the groups leave (the output layer of an attention), and has the
            scores if they are learned: one for each group, with the gradient summed over all members.
        measured: the score of each group from a pass over data, for scorers that `measures`.
    """

    members: list[Member]
    measured: Tensor | None = None

    @property
    def name(self) -> str:
        """Name of the first weight."""
        return self.members[0].name

    @property
    def module(self) -> nn.Module:
        """Layer of the first weight."""
        return self.members[0].module

    @property
    def masked(self) -> MaskedWeight:
        """Mask of the first weight."""
        return self.members[0].masked

    @property
    def pattern(self) -> Pattern:
        """How the first weight is divided."""
        return self.members[0].pattern

    def group_scores(self, scorer: Scorer) -> Tensor:
        """Return the score of each group: the learned one, or the mean over all its entries in all members."""
        if self.masked.scores is not None:
            return self.masked.scores.detach()
        if scorer.measures:
            if self.measured is None:
                raise SparsityError(
                    f"scorer '{scorer.name}' has seen no data: call Pruner.measure(batches), or sparsify with batches"
                )
            return self.measured
        return self._pooled([self._element_scores(scorer, member) for member in self.members])

    def regrown_scores(self, scorer: Scorer, place: int, progress: float) -> Tensor:
        """Return the scores of a scorer that regrows; `place` is the number of this unit in its plan."""
        kept, seen = self.kept(), [member.masked.importance for member in self.members]
        complete = [one for one in seen if one is not None]
        gradient = self._pooled(complete) if len(complete) == len(seen) else None
        return scorer.regrow(self.group_scores(scorer), kept, scorer.growth(gradient, kept, place), progress)

    def _pooled(self, elements: Sequence[Tensor]) -> Tensor:
        if len(self.members) == 1:
            return self.pattern.pool(elements[0])
        sums = [m.pattern.pool(tensor.float(), "sum") for m, tensor in zip(self.members, elements, strict=True)]
        total = torch.stack(sums).sum(0)
        return total * (total.numel() / sum(member.masked.mask.numel() for member in self.members))

    @staticmethod
    def _element_scores(scorer: Scorer, member: Member) -> Tensor:
        return scorer.element_scores(hidden(member.module).detach(), member.masked.importance)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return math.prod(self.pattern.groups_shape(tuple(self.masked.mask.shape)))

    def kept(self) -> Tensor:
        """Return which groups are kept, one bool per group."""
        return self.pattern.pool(self.masked.mask.float(), "sum") > 0

    def keep(self, groups: Tensor) -> None:
        """Keep the groups that are True, remove the others; every process has the whole mask, whatever is sharded."""
        if isinstance(groups, DTensor):
            groups = groups.full_tensor()
        for member in self.members:
            member.masked.mask.copy_(member.pattern.expand(groups, tuple(member.masked.mask.shape)))

    def grow(self, groups: Tensor) -> None:
        """Keep the groups that are True, and start at 0 those that were removed."""
        for member in self.members:
            mask = member.pattern.expand(groups, tuple(member.masked.mask.shape))
            hidden(member.module).data.masked_fill_(mask & ~member.masked.mask, 0.0)
        self.keep(groups)

    def keep_all(self) -> None:
        """Remove nothing."""
        for member in self.members:
            member.masked.mask.fill_(True)

    def observe(self, scorer: Scorer, scale: float = 1.0) -> bool:
        """Show the scorer the gradients gathered since the last optimizer step, averaged over all processes.

        Args:
            scale: of the loss that they are gradients of.

        Returns:
            Whether they were finite; the scorer sees no others.
        """
        gathered = []
        for member in self.members:
            gradient, member.masked.gathered = member.masked.gathered, None
            if gradient is not None:
                gathered.append((member, gradient))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for _, gradient in gathered:
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
        # A loss scaler that overflowed skips its step; the scores must not remember it.
        finite = all(bool(torch.isfinite(gradient.sum())) for _, gradient in gathered)
        if finite:
            for member, gradient in gathered:
                # Sums over steps would otherwise be of the steps with the highest scale, which changes by powers of 2.
                gradient /= scale
                if member.masked.importance is None:
                    member.masked.importance = torch.zeros_like(gradient)
                scorer.observe(member.masked.importance, hidden(member.module).detach(), gradient)
        return finite

    def watch(self, scorer: Scorer, progress: float) -> None:
        """Gather the gradient of the next step only if the scorer wants it, and let go of what it forgets."""
        for member in self.members:
            member.masked.watching = scorer.watches(progress)
            if member.masked.forgets:
                member.masked.importance = None

    def bake(self) -> None:
        """Make the zeros part of weights and of the biases that belong to removed groups, and take the masks off."""
        for member in self.members:
            bias = member.module.bias
            if member.has_bias and isinstance(bias, nn.Parameter):
                # In place, so that it stays the parameter that an optimizer knows. A bias needs no mask of its own
                # before this: behind it the exit is masked.
                bias.data.masked_fill_(placed_as(~member.masked.mask.any(1), bias), 0.0)
            bake_mask(member.module)


def find_shares(
    model: nn.Module, pattern: Pattern, targets: Sequence[NamePattern] | None, exclude: Sequence[NamePattern]
) -> list[list[Share]]:
    """Return the layers of each unit that a pattern makes of the weights that are meant.

    Raises:
        PatternError: if the pattern does not fit a weight, or needs an architecture that is not known.
        RecipeError: if targets or exclude match nothing.
    """
    if isinstance(pattern, Structure):
        blocks = match_sub_blocks(model, pattern.kinds, targets, exclude, f"pattern {pattern}")
        return [
            [
                Share(block.output_name, block.output, pattern.part(1, block.size)),
                *(Share(name, layer, pattern.part(0, block.size), True) for name, layer in block.inputs.items()),
            ]
            for block in blocks
        ]
    layers = match_layers(model, targets, exclude)
    for name, layer in layers.items():
        pattern.check(tuple(layer.weight.shape), f"{name}.weight")
    return [[Share(name, layer, pattern)] for name, layer in layers.items()]


def attach_unit(shares: Sequence[Share], scorer: Scorer, shared: dict[str, Tensor]) -> Unit:
    """Put masks that keep everything on the weights of a unit.

    Args:
        shared: see `Scorer.shared_state`.

    Raises:
        RecipeError: as `attach_mask`.
    """
    members: list[Member] = []
    for share in shares:
        masked = MaskedWeight(
            share.layer.weight,
            share.pattern,
            learned=getattr(torch, scorer.dtype) if scorer.learned else None,
            observes=scorer.observes,
            forgets=scorer.forgets,
            shared=shared,
            exit=members[0].masked if members else None,
        )
        attach_mask(share.layer, masked, f"{share.name}.weight")
        members.append(Member(f"{share.name}.weight", share.layer, masked, share.pattern, share.has_bias))
    return Unit(members)
