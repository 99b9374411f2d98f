"""Sort the inputs of a layer so that n:m removes less of it, and undo that in the layers before: the outputs stay.

n:m keeps the n largest of every m neighbouring inputs; where large ones meet, some are lost. The inputs of the layer
that ends a feed-forward part are its neurons, and those of the layer that ends an attention the inner dimensions of the
values of each head: they can be put in another order if the rows of the layers before are too. What goes along the
residual stream stays where it is.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..modeling.architectures import SubBlock, find_sub_blocks
from ..modeling.layer_kinds import matrix_shape, oriented
from .masked_weight import check_free

ROUNDS = 100
_IDLE = 10
"""Rounds in a row without a change after which the search ends."""
_EXHAUSTIVE = 4
"""Up to this m, all ways to share 2m inputs between two groups are tried (35 for 4), above it all single swaps."""


@dataclasses.dataclass(frozen=True)
class Permuted:
    """What n:m keeps of a weight, as a share of the sum of its absolute values.

    Attributes:
        name: of the weight.
        before: with the inputs as they were.
        after: as they are now.
    """

    name: str
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.name}: {self.before:.4f} -> {self.after:.4f}"


@torch.no_grad()
def permute_for_nm(model: nn.Module, n: int = 2, m: int = 4, *, rounds: int = ROUNDS) -> list[Permuted]:
    """Reorder neurons, and the values within heads, so that n:m patterns keep more; the model computes the same.

    Call it before masks are attached, and on every process of a training (it draws from a generator of its own).
    A layer whose inputs, or heads, are not a multiple of m is left as it is, and is not in the report; so is the output
    layer of an attention with grouped queries, in which several heads share their values.

    Args:
        model: of a family that `architectures` knows; changed in place.
        rounds: how often, at most, all groups of m inputs are paired anew, and each pair shared out in the best way.

    Returns:
        One entry for each layer that could be permuted, in the order of the model.

    Raises:
        PatternError: if no family knows the model.
        RecipeError: if n and m do not form a pattern, or a weight has a mask, is quantized or is not in memory.

    Source: Pool and Yu 2021, "Channel Permutations for N:M Sparsity"; the pairs are drawn at random here instead of
    all being searched.
    """
    if not (type(n) is type(m) is int and 1 <= n < m):
        raise RecipeError(f"`n` and `m` must be integers with 1 <= n < m, got {n!r}:{m!r}")
    blocks = [block for block in find_sub_blocks(model, "permuting for n:m") if block.groups]
    for block in blocks:
        for name, layer in ((block.output_name, block.output), *block.inputs.items()):
            check_free(layer, f"{name}.weight")
    report = []
    for block in blocks:
        segments = 1 if block.kind == "feed_forward" else block.groups
        if matrix_shape(block.output)[1] // segments % m or block.is_grouped:  # heads that share their values
            continue
        size = oriented(block.output, block.output.weight.detach()).abs().float()
        before = _kept(size, n, m)
        order = best_order(size, n, m, segments, rounds)
        _apply(block, order)
        after = _kept(size[:, order], n, m)
        total = max(float(size.sum(dtype=torch.float64)), 1e-30)
        report.append(Permuted(f"{block.output_name}.weight", before / total, after / total))
    return report


def _kept(size: Tensor, n: int, m: int) -> float:
    return float(_highest(size.view(-1, m), n).sum(dtype=torch.float64))


def _apply(block: SubBlock, order: Tensor) -> None:
    # Of an attention only the values meet the output; query and key meet each other.
    for part in (block.exit, *(block.parts if block.kind == "feed_forward" else block.parts[-1:])):
        layer, lines = part.layer, part.lines().flatten().to(order.device)
        layer.weight.index_copy_(part.axis, lines, layer.weight.index_select(part.axis, lines[order]))
        if part is not block.exit and layer.bias is not None:
            layer.bias.index_copy_(0, lines, layer.bias.index_select(0, lines[order]))


def best_order(size: Tensor, n: int, m: int, segments: int = 1, rounds: int = ROUNDS) -> Tensor:
    """Return an order of the columns in which n:m keeps more, never less, than as they are.

    Args:
        size: absolute values.
        segments: equal runs of columns that keep their columns.

    Shapes: `(out, in)` -> `(in,)`.

    Example:
        >>> size = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]])
        >>> sorted(size[0, best_order(size, 2, 4)][:4].tolist())
        [0.0, 0.0, 8.0, 9.0]
    """
    width = size.shape[1] // segments
    order = torch.arange(size.shape[1], device=size.device).view(segments, width // m, m)
    splits = _splits(m)
    chosen = torch.tensor(splits, device=size.device)
    parts = list(dict.fromkeys(tuple(sorted(half)) for split in splits for half in (split[:m], split[m:])))
    places = {part: index for index, part in enumerate(parts)}
    halves = torch.tensor([[places[tuple(sorted(s[:m]))], places[tuple(sorted(s[m:]))]] for s in splits])
    halves = halves.to(size.device)
    columns = size.t().contiguous()
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device draws the same
    pairs = width // m // 2
    idle = 0
    for _ in range(rounds if pairs else 0):
        drawn = torch.randperm(width // m, generator=generator)[: 2 * pairs].to(size.device)
        both = order[:, drawn].view(segments * pairs, 2 * m)
        seen = columns[both]
        sums = torch.stack([_highest(seen[:, list(part)].transpose(1, 2), n).sum(1) for part in parts])
        gains = sums[halves[:, 0]] + sums[halves[:, 1]]
        # Only what is clearly better than the first, which is how they are: rounding must not turn in circles.
        better = gains.amax(0) > gains[0] * (1 + 1e-6)
        idle = 0 if bool(better.any()) else idle + 1
        if idle == _IDLE:
            break
        best = torch.where(better, gains.argmax(0), 0)
        order[:, drawn] = both.gather(1, chosen[best]).view(segments, 2 * pairs, m)
    return order.view(-1)


def _highest(groups: Tensor, n: int) -> Tensor:
    """Return the sum of the n highest of the last dimension."""
    if n == 2 and groups.shape[-1] == 4:  # several times faster than sorting: they are in one half, or one in each
        a, b, c, d = groups.unbind(-1)
        return torch.maximum(torch.maximum(a, b) + torch.maximum(c, d), torch.maximum(a + b, c + d))
    return groups.topk(n, dim=-1).values.sum(-1)


def _splits(m: int) -> list[tuple[int, ...]]:
    """Return ways to share 2m inputs between two groups of m; the first leaves them as they are.

    Example:
        >>> _splits(2)
        [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
    """
    every = range(2 * m)
    if m <= _EXHAUSTIVE:
        firsts = [half for half in itertools.combinations(every, m) if 0 in half]
        return [(*half, *(one for one in every if one not in half)) for half in firsts]
    splits = [tuple(every)]
    for one, other in itertools.product(range(m), range(m, 2 * m)):
        swapped = list(every)
        swapped[one], swapped[other] = other, one
        splits.append(tuple(swapped))
    return splits
