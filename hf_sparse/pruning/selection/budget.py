"""A budget instead of a sparsity: what may be left of operations, parameters or time, spent where it matters most."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...config.sparsity import SELECTIONS
from ...errors import PatternError, SparsityError
from ...modeling.layer_kinds import matrix_shape
from ...profiling.latency_table import LatencyTable, Shape
from ...utils.validation import check_number, check_one_of, check_positive_int
from ..shards import whole
from .base import Selection
from .filter_costs import FilterCosts
from .topk import refuse_nan

OF = ("flops", "parameters", "latency")
_BUCKETS = 4000
"""Steps into which a latency budget is divided: each sub-block's time is rounded up by at most one of them."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the groups of one unit cost.

    Args:
        kind: "attention" or "feed_forward".
        width: features that go in and come out of the sub-block.
        groups: heads or neurons; 1 for a whole sub-block.
        size: rows of each group in every input layer.
        inputs: number of input layers.
        entries: weights of one group, where the input layers do not have `size` rows for each (a KV head that several
            heads read); None = they do.
        multiple: groups that leave together.
    """

    kind: Literal["attention", "feed_forward"]
    width: int
    groups: int
    size: int
    inputs: int
    entries: float | None = None
    multiple: int = 1

    @property
    def parameters(self) -> float:
        """Weights of one group."""
        return self.entries if self.entries is not None else (self.inputs + 1) * self.width * self.size

    @property
    def marks(self) -> Tensor:
        """The numbers of groups that may be left, ascending."""
        return torch.tensor([*range(0, self.groups, self.multiple), self.groups])

    def flops(self, length: int) -> float:
        """Floating-point operations of one group for one token of an example of this length."""
        # Two for each weight; an attention also compares each token with all others, and mixes their values.
        return 2 * self.parameters + (4 * length * self.size if self.kind == "attention" else 0)


@SELECTIONS.register("budget")
@dataclasses.dataclass
class Budget(Selection):
    """Keep what is worth most within a budget, over all heads and neurons together.

    Scores are taken as importance per parameter, as means are. Of operations and parameters every group has its share,
    so the groups with the lowest scores go until the budget is kept. Time is not shared that way: a table of timed
    shapes says what a sub-block with k groups takes on this machine, and the number left in each is chosen so that the
    least importance is lost within the time. Filters multiply with those of the next layer: what is left of the
    parameters of both is counted exactly, and one filter of each convolution stays.

    Args:
        of: "flops", "parameters" or "latency"; of filters "parameters".
        remaining: what may be left at the end of what the targeted sub-blocks cost dense, in (0, 1).
        length: tokens per example, for operations and time.
        batch: examples per batch, for time.

    Raises:
        RecipeError: for anything else.

    Example:
        >>> budget = Budget(of="parameters", remaining=0.5)
        >>> budget.prepare([Costs("attention", 8, 2, 4, 3), Costs("feed_forward", 8, 8, 1, 1)])
        >>> heads, neurons = torch.tensor([1.0, 9.0]), torch.tensor([2.0, 2.0, 2.0, 2.0, 8.0, 8.0, 8.0, 8.0])
        >>> [kept.tolist() for kept in budget.select([heads, neurons], 1.0)]
        [[False, True], [False, False, False, False, True, True, True, True]]

    Source: Kurtic et al. 2023, "ZipLM", section 3.2 (structured time tables, dynamic programming); Kwon et al. 2022, "A
    Fast Post-Training Pruning Framework for Transformers", section 4.1.
    """

    of: str = "flops"
    remaining: float = 0.5
    length: int = 128
    batch: int = 1
    used: float = dataclasses.field(default=1.0, init=False, repr=False, compare=False)
    _costs: Sequence[Costs] = dataclasses.field(default=(), init=False, repr=False, compare=False)
    _filters: FilterCosts | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    _times: list[Tensor] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_one_of("of", self.of, OF)
        check_number("remaining", self.remaining, "(0, 1)")
        check_positive_int("length", self.length)
        check_positive_int("batch", self.batch)

    @property
    def decides_sparsity(self) -> bool:
        return True

    def prepare_units(self, units: Sequence[Any], pattern: Any) -> None:
        if not pattern.structural:
            raise PatternError(
                "selection 'budget' counts what is left when heads, neurons or sub-blocks are removed, but pattern "
                f"{pattern} leaves every layer as large as it is. Use pattern 'head+neuron', 'head', 'neuron', "
                "'layer' or 'filter', or request a sparsity"
            )
        if units[0].source is not None:
            if self.of != "parameters":
                raise PatternError(
                    f"selection 'budget' of {self.of} does not know what a filter costs, which depends on the size of "
                    "the images. Use of: parameters, or request a sparsity of the filters"
                )
            self._filters = FilterCosts.of(units, pattern.multiple("convolution"))
            least = self._filters.left([min(self._filters.multiple, count) for count in self._filters.filters])
            if least > self.remaining:
                raise PatternError(
                    f"selection 'budget' cannot leave {self.remaining:g} of the parameters: each convolution keeps at "
                    f"least {self._filters.multiple} filters, and then {least:.3g} are left"
                )
            return
        costs = []
        for unit in units:
            width, inner = matrix_shape(unit.module)
            size, each = inner // unit.groups, int(unit.entries().sum()) / unit.groups
            inputs = round(each / (width * size)) - 1
            regular = each == (inputs + 1) * width * size and (unit.kind != "attention" or inputs == 3)
            if not regular and self.of == "latency":
                raise PatternError(
                    f"selection 'budget' of latency times attentions in which each head has a KV head of its own, but "
                    f"in '{unit.name}' several heads read one. Use of: flops or of: parameters there"
                )
            entries, multiple = None if regular else each, pattern.multiple(unit.kind)
            costs.append(Costs(unit.kind, width, unit.groups, size, inputs, entries, multiple))
        self.prepare(costs)

    def prepare(self, costs: Sequence[Costs], table: LatencyTable | None = None) -> None:
        """Learn what the groups cost; times are measured here, by process 0 for all.

        Args:
            costs: of each unit, in the order of the scores.
            table: of times; None = the one that is kept on this machine.
        """
        self._costs = tuple(costs)
        if self.of == "latency":
            times = _timed(self._costs, self.length, self.batch, table or LatencyTable())
        else:
            each = [c.parameters if self.of == "parameters" else c.flops(self.length) for c in self._costs]
            times = [
                torch.arange(c.groups + 1, dtype=torch.float64) * cost
                for c, cost in zip(self._costs, each, strict=True)
            ]
        self._times = [own[c.marks] for own, c in zip(times, self._costs, strict=True)]

    def select(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        """Keep groups within the budget of the moment: `sparsity` is the share of the way to the final one.

        Args:
            scores: of groups, or of chunks of as many as leave together.
        """
        known = self._costs if self._filters is None else self._filters.filters
        if len(scores) != len(known):
            raise SparsityError(f"the budget knows {len(known)} units, and was given the scores of {len(scores)}")
        refuse_nan(scores)
        scores = [whole(tensor.detach()) for tensor in scores]  # of heads and neurons, which are few
        flat = [tensor.reshape(-1).double().cpu() for tensor in scores]
        share = 1.0 - (1.0 - self.remaining) * sparsity
        if share >= 1.0:
            kept, self.used = [torch.ones_like(tensor, dtype=torch.bool) for tensor in flat], 1.0
        elif self._filters is not None:
            kept, self.used = self._filters.highest(flat, share)
        else:
            kept = self._within(flat, share)
        return [mask.view(tensor.shape).to(tensor.device) for mask, tensor in zip(kept, scores, strict=True)]

    def logs(self) -> dict[str, float]:
        return {f"remaining_{self.of}": self.used}

    def _within(self, scores: list[Tensor], share: float) -> list[Tensor]:
        """Return what is kept within a share of the costs of all."""
        total = sum(float(times[-1]) for times in self._times)
        kept = (self._by_table if self.of == "latency" else self._by_rank)(scores, share * total)
        used = sum(float(times[int(mask.sum())]) for times, mask in zip(self._times, kept, strict=True))
        self.used = used / total
        return kept

    def _by_rank(self, scores: list[Tensor], limit: float) -> list[Tensor]:
        """Keep the highest scores for as long as they can be paid."""
        costs = torch.cat([t[1:] - t[:-1] for t in self._times])
        values, order = torch.cat(scores).sort(descending=True, stable=True)
        # A little more than the limit, for the sum of the same costs in another order.
        affordable = costs[order].cumsum(0) <= limit * (1 + 1e-9)
        mask = torch.zeros_like(affordable)
        mask[order[affordable]] = True
        count = int(affordable.sum())
        self.threshold = float(values[count - 1]) if 0 < count < len(values) else None
        return list(mask.split([len(tensor) for tensor in scores]))

    def _by_table(self, scores: list[Tensor], limit: float) -> list[Tensor]:
        """Choose how many groups each unit keeps, so that the least is lost in the time there is."""
        lowest = min(float(tensor.min()) for tensor in scores)
        orders, lost = [], []
        for tensor, cost in zip(scores, self._costs, strict=True):
            # Shifted to be losses, of which none is negative: what is not needed for the budget is never removed.
            mass = (tensor - lowest) * cost.parameters * cost.marks.diff()
            values, order = mass.sort(descending=True, stable=True)
            orders.append(order)
            lost.append(torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]))
        counts = _fewest_lost(self._times, lost, limit)
        masks = []
        for order, count in zip(orders, counts, strict=True):
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[:count]] = True
            masks.append(mask)
        return masks


def _fewest_lost(times: list[Tensor], lost: list[Tensor], limit: float) -> list[int]:
    """Return how many groups each unit keeps: the least loss whose times add up to the limit at most.

    Args:
        times, lost: for each unit, time and loss with k groups left.

    Dynamic programming over units and buckets of time; times are rounded up, so the limit holds.
    """
    bucket = limit / _BUCKETS
    best = torch.zeros(_BUCKETS + 1, dtype=torch.float64)
    chosen: list[Tensor] = []
    for unit, loss in zip(times, lost, strict=True):
        costs = (unit / bucket - 1e-9).ceil().clamp(min=0).long()
        # Of all counts that take the same buckets only the highest is of use. From the top: equal losses keep more.
        useful = [k for k in range(len(costs)) if k + 1 == len(costs) or costs[k + 1] > costs[k]][::-1]
        after = torch.full_like(best, float("inf"))
        choice = torch.zeros(_BUCKETS + 1, dtype=torch.long)
        for k in useful:
            cost = int(costs[k])
            if cost > _BUCKETS:
                continue
            value = best[: _BUCKETS + 1 - cost] + loss[k]
            better = value < after[cost:]
            after[cost:] = torch.where(better, value, after[cost:])
            choice[cost:] = torch.where(better, torch.full_like(choice[cost:], k), choice[cost:])
        best = after
        chosen.append(choice)
    counts, room = [], _BUCKETS
    for unit, choice in zip(reversed(times), reversed(chosen), strict=True):
        count = int(choice[room])
        counts.append(count)
        room -= int((unit[count] / bucket - 1e-9).ceil().clamp(min=0))
    return counts[::-1]


def _timed(costs: Sequence[Costs], length: int, batch: int, table: LatencyTable) -> list[Tensor]:
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    tables: dict[Costs, Tensor] = {}
    for cost in costs:
        if cost in tables:
            continue
        shape = Shape(cost.kind, cost.width, cost.groups, cost.size, cost.inputs, length, batch)
        measured = [table.times(shape).tolist() if not shared or dist.get_rank() == 0 else None]
        if shared:
            dist.broadcast_object_list(measured, 0)  # every process has to cut at the same place
        tables[cost] = torch.tensor(measured[0], dtype=torch.float64)
    return [tables[cost] for cost in costs]
