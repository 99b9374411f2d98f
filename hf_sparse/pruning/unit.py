"""A unit: weights that share one mask. One weight alone, or the weights of all heads or neurons of a sub-block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import SparsityError
from ..modeling.architectures import FilterBlock
from ..modeling.layer_kinds import MatrixLayer, Slot, oriented
from .mask_state_dict import attach_mask, bake_mask
from .masked_weight import MaskedWeight, hidden
from .patterns import AssignedLines, Lines, Pattern
from .shards import count_true, local, on_shards, placed_as, row_group, rows_per_process, total, whole
from .state_fields import StateField


@dataclasses.dataclass(eq=False)
class Member:
    """One weight of a unit.

    Attributes:
        layer_name: name of its layer in the model; of one weight of several, of the weight itself.
        module: the layer, or what holds the weight.
        pattern: which entries of the weight, as it is stored, belong to a group.
        has_bias: whether the bias of the layer belongs to the groups too, one entry with each output.
        mask: on the weight, while it is attached.
        gradient: of the loss of this optimizer step with respect to the masked weight, dense, while the scorer looks
            at it.
    """

    layer_name: str
    module: MatrixLayer
    pattern: Pattern
    has_bias: bool = False
    mask: MaskedWeight | None = None
    gradient: Tensor | None = None
    attribute: str = "weight"

    @property
    def slot(self) -> Slot:
        """Where the weight is."""
        return Slot(self.module, self.attribute)

    @property
    def weight(self) -> Tensor:
        """The weight as the model computes with it: masked, while there is a mask."""
        return self.slot.tensor

    @property
    def hidden(self) -> nn.Parameter:
        """The dense weight under the mask, the parameter that the optimizer trains."""
        return hidden(self.module, self.attribute)

    @property
    def name(self) -> str:
        """Name of the weight."""
        return f"{self.layer_name}.weight" if self.attribute == "weight" else self.layer_name

    @property
    def masked(self) -> MaskedWeight:
        """The mask.

        Raises:
            SparsityError: if there is none at the moment.
        """
        if self.mask is None:
            raise SparsityError(f"'{self.name}' has no mask: call Pruner.attach() first (bake() takes it off)")
        return self.mask

    @property
    def dense(self) -> Tensor:
        """The dense weight under the mask, without its history."""
        return self.hidden.detach() if self.mask is None else self.mask.dense_of(self.hidden)

    @property
    def layout(self) -> Tensor:
        """A tensor that is divided over the processes as the weight is."""
        return self.masked.layout(self.hidden)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is stored, wherever it is at the moment."""
        return self.slot.shape if self.mask is None else tuple(self.mask.mask.shape)

    @property
    def divisible(self) -> bool:
        """Whether the dense weight is divided by rows, and every group lies in the rows of one process."""
        rows = rows_per_process(self.layout)
        return rows > 0 and self.pattern.divides(rows)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclasses.dataclass(eq=False)
class Unit:
    """Weights that share one vector of groups.

    Attributes:
        members: at least one. The first is where the groups leave (the output layer of an attention), and has the
            scores if they are learned: one for each group, with the gradient summed over all members.
        kind: of the sub-block, "attention", "feed_forward" or "convolution"; None for a weight alone.
        source: the convolution whose filters are the groups. They leave by the one member, the weight that reads them;
            their own weight may be a member of another unit, that of the filters which it reads.
    """

    members: list[Member]
    kind: str | None = None
    source: FilterBlock | None = None

    @property
    def name(self) -> str:
        """Name of the first weight."""
        return self.members[0].name

    @property
    def module(self) -> MatrixLayer:
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

    @property
    def groups(self) -> int:
        """Number of groups."""
        return math.prod(self.pattern.groups_shape(self.members[0].shape))

    @property
    def slots(self) -> list[Slot]:
        """The weights that have zeros once it is pruned."""
        own = [] if self.source is None else [Slot(self.source.module)]
        return [*(member.slot for member in self.members), *own]

    @property
    def names(self) -> list[str]:
        """Full names of `slots`."""
        return [member.name for member in self.members] + (
            [] if self.source is None else [f"{self.source.name}.weight"]
        )

    def score(self, element_scores: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the score of each group from scores of the entries of dense weights."""
        if self.source is None:
            return self.pool([element_scores(whole(member.dense)) for member in self.members])
        parameter = Slot(self.source.module).parameter
        assert parameter is not None
        return Lines(axis=0, size=1).pool(element_scores(whole(parameter.detach())))

    def pool(self, elements: Sequence[Tensor]) -> Tensor:
        """Return the score of each group: the mean over all its entries in all members.

        Args:
            elements: for each member a score per entry.
        """
        if len(self.members) == 1:
            return self.pattern.pool(elements[0])
        sums = [m.pattern.pool(tensor.float(), "sum") for m, tensor in zip(self.members, elements, strict=True)]
        total = torch.stack(sums).sum(0)
        if any(isinstance(member.pattern, AssignedLines) for member in self.members):
            return total / self.entries(total.device)
        return total * (total.numel() / sum(member.masked.mask.numel() for member in self.members))

    def entries(self, device: torch.device | None = None) -> Tensor:
        """Return how many entries each group has in all members."""
        counts = []
        for member in self.members:
            shape, pattern = member.shape, member.pattern
            if isinstance(pattern, AssignedLines):
                counts.append(pattern.entries(shape, torch.device("cpu")))
            else:
                counts.append(torch.full((self.groups,), math.prod(shape) // self.groups))
        return torch.stack(counts).sum(0).to(device)

    def kept(self) -> Tensor:
        """Return which groups are kept, one bool per group."""
        return self.pattern.pool(whole(self.masked.mask).float(), "sum") > 0

    def kept_placed(self) -> Tensor:
        """Return which groups are kept, divided among the processes as the weights are."""
        pooled = self._pool_shards([self.masked.mask], Tensor.float)
        return self.placed(self.kept()) if pooled is None else pooled > 0

    def count_kept(self) -> int:
        """Return how many groups are kept."""
        mask = self.masked.mask
        return count_true([mask if self.groups == mask.numel() else self.kept()])

    def placed(self, groups: Tensor) -> Tensor:
        """Return one tensor over the groups divided by rows among the processes, if the dense weight is."""
        layout = self.members[0].layout
        return placed_as(groups, layout) if row_group(layout) is not None else groups

    def pool_placed(self, elements: Sequence[Tensor], scores_of: Callable[[Tensor], Tensor] = _same) -> Tensor:
        """Return the score of each group, divided among the processes as the weights are.

        Where each group lies in the rows of one process, that process computes its score; else one member after the
        other is gathered.

        Args:
            elements: for each member a tensor like its dense weight, sharded if that is.
            scores_of: from a part of such a tensor to a score per entry of that part.
        """
        pooled = self._pool_shards(elements, scores_of)
        return self.placed(self.pool([scores_of(whole(each)) for each in elements])) if pooled is None else pooled

    def _pool_shards(self, elements: Sequence[Tensor], scores_of: Callable[[Tensor], Tensor]) -> Tensor | None:
        (member, *others), tensor = self.members, elements[0]
        if others or not isinstance(tensor, DTensor) or not member.divisible:
            return None
        groups = member.pattern.groups_shape(member.shape)[0]
        return on_shards(lambda rows: member.pattern.pool(scores_of(rows)), tensor, groups)

    def alive(self) -> Tensor:
        """Return which groups have an entry that is not zero in any weight; for weights without masks."""
        counts = [member.pattern.pool((member.weight != 0).float(), "sum") for member in self.members]
        return torch.stack(counts).sum(0) > 0

    def keep(self, groups: Tensor) -> None:
        """Keep the groups that are True, remove the others.

        Args:
            groups: whole, or sharded in the order of the ranks. Where groups lie in the rows of one process each, a
                sharded mask is made of them without gathering.
        """
        for member in self.members:
            member.masked.renew(self._mask_of(member, groups), member.layout)

    def _mask_of(self, member: Member, groups: Tensor) -> Tensor:
        """Return the mask of a weight that keeps the groups that are True, placed as the dense weight."""
        shape = tuple(member.masked.mask.shape)
        if isinstance(groups, DTensor) and member.divisible and row_group(groups) == row_group(member.layout):
            return on_shards(
                partial(_expand_rows, member.pattern, shape[0] // len(groups), shape[1:]), groups, shape[0]
            )
        return placed_as(member.pattern.expand(whole(groups), shape), member.layout)

    def grow(self, groups: Tensor) -> None:
        """Keep the groups that are True, and start at 0 those that were removed."""
        for member in self.members:
            mask = self._mask_of(member, groups)
            member.masked.place(member.dense)
            local(member.dense).masked_fill_(local(mask) & ~local(member.masked.mask), 0.0)
            member.masked.renew(mask, member.dense)

    def keep_all(self) -> None:
        """Remove nothing."""
        for member in self.members:
            member.masked.keep_all()

    def watch(self, watching: bool) -> None:
        """Gather the dense gradient in the backward passes that follow, or do not."""
        for member in self.members:
            member.masked.watching = watching

    def take_gradients(self, scale: float = 1.0, average: bool = True) -> bool:
        """Give each member the gradient gathered since the last optimizer step, averaged over all processes.

        Args:
            scale: of the loss that they are gradients of.
            average: False for the gradient of this process alone.

        Returns:
            Whether they were finite; otherwise no member has one. A loss scaler that overflowed skips its step, and
            the scores must not remember it.
        """
        gathered = []
        for member in self.members:
            member.masked.place(member.dense)
            gradient, member.masked.gathered = member.masked.gathered, None
            if gradient is not None:
                gathered.append((member, gradient))
        if average and torch.distributed.is_available() and torch.distributed.is_initialized():
            for _, gradient in gathered:
                if not isinstance(gradient, DTensor):  # one that is sharded was averaged in the backward pass
                    torch.distributed.all_reduce(gradient)
                    gradient /= torch.distributed.get_world_size()
        finite = total(lambda shard: int(not shard.sum().isfinite()), (gradient for _, gradient in gathered)) == 0
        for member, gradient in gathered:
            # Sums over steps would otherwise be of the steps with the highest scale, which changes by powers of 2.
            member.gradient = gradient.div_(scale) if finite else None
        return finite

    def drop_gradients(self) -> None:
        """Forget the gradients of `take_gradients`."""
        for member in self.members:
            member.gradient = None

    def make_masks(self, fields: Sequence[StateField], shared: Mapping[str, Tensor]) -> None:
        """Make masks that keep everything, and do not put them on yet.

        Args:
            fields: what a state dict holds of the method.
            shared: numbers of the method that all masks of its group share.
        """
        leader: MaskedWeight | None = None
        for member in self.members:
            member.mask = MaskedWeight(member.weight, member.pattern, fields, shared, exit=leader)
            leader = leader or member.mask

    def attach(self) -> None:
        """Put the masks on the weights.

        Raises:
            RecipeError: as `attach_mask`.
        """
        for member in self.members:
            attach_mask(member.module, member.masked, member.name, member.attribute)

    def bake(self) -> None:
        """Make the zeros part of weights and of the biases that belong to removed groups, and take the masks off."""
        for member in self.members:
            bias = getattr(member.module, "bias", None)  # an embedding has none
            if member.has_bias and isinstance(bias, nn.Parameter):
                # A bias needs no mask of its own before this: behind it the exit is masked.
                kept = oriented(member.module, whole(member.masked.mask)).any(1)
                member.masked.zero_beside(bias, ~kept)
            if self.source is not None:
                self.source.zero(~self.kept())
            bake_mask(member.module, member.attribute)
            member.mask = member.gradient = None


def _expand_rows(pattern: Pattern, height: int, columns: tuple[int, ...], groups: Tensor) -> Tensor:
    return pattern.expand(groups, (len(groups) * height, *columns))
