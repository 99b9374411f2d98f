"""How sparse each layer should be for a total: by the shapes of the layers, or by how sensitive the loss is.

Both return whole numbers of kept weights whose sum is exactly what the total asks for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..pruning.selection import kept_count

HALVINGS = 200


def erdos_renyi(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, int]:
    """Return the kept weights of each layer, its density in proportion to `(n_in + n_out) / (n_in * n_out)`.

    A layer whose density would be above 1 stays dense, and the others make up for it.

    Example:
        >>> erdos_renyi({"square": (8, 8), "thin": (4, 16)}, 0.5)  # densities as 16/64 to 20/64
        {'square': 28, 'thin': 36}

    Source: Evci et al. 2020, "Rigging the Lottery", section 3(1), after Mocanu et al. 2018.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total = _total(sizes, sparsity)
    full: set[str] = set()
    while True:
        rest = {name: sum(shape) for name, shape in shapes.items() if name not in full}
        left = total - sum(sizes[name] for name in full)
        scale = left / max(1, sum(rest.values()))
        over = {name for name, sides in rest.items() if scale * sides > sizes[name]}
        if not over:
            wanted = {name: float(sizes[name]) if name in full else scale * sum(shapes[name]) for name in sizes}
            return _whole(wanted, sizes, total)
        full |= over


def by_sensitivity(
    sizes: Mapping[str, int], levels: Sequence[float], increases: Mapping[str, Sequence[float]], sparsity: float
) -> dict[str, int]:
    """Return the kept weights of each layer such that pruning each alone raises the loss by the same amount.

    Between the measured levels the increase is taken as a straight line, from none at sparsity 0; where it falls with
    sparsity it counts as flat. No layer goes above the highest level, behind which nothing was measured.

    Args:
        sizes: weights of each layer.
        levels: sparsities that were measured, ascending.
        increases: of the loss, one for each level.
        sparsity: of all layers together.

    Raises:
        RecipeError: if the total is above the highest level, or an increase is not finite.

    Example:
        >>> by_sensitivity({"a": 100, "b": 100}, [0.8], {"a": [1.0], "b": [3.0]}, 0.4)  # 0.6 of a, 0.2 of b
        {'a': 40, 'b': 80}
    """
    check_total(sparsity, levels)
    total = _total(sizes, sparsity)
    for name in sizes:
        if not all(map(math.isfinite, increases[name])):
            raise RecipeError(f"the loss is not finite with '{name}' pruned, so what that costs is not known")
    curves = {name: _curve(levels, increases[name]) for name in sizes}

    def kept(increase: float, highest: bool) -> dict[str, float]:
        return {name: (1 - _inverse(curve, increase, highest)) * sizes[name] for name, curve in curves.items()}

    low, high = 0.0, max(curve[-1][1] for curve in curves.values())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(kept(middle, False).values()) > total:
            low = middle
        else:
            high = middle
    # Where a curve is flat its sparsity jumps at one increase: go as far along all such jumps as the total needs.
    most, least = kept(low, False), kept(high, True)
    gap = sum(most.values()) - sum(least.values())
    share = min(1.0, max(0.0, (sum(most.values()) - total) / gap)) if gap else 0.0
    wanted = {name: most[name] + share * (least[name] - most[name]) for name in sizes}
    return _whole(wanted, sizes, total)


def groups_of(kept: Mapping[str, int], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the groups of a recipe that keep exactly these numbers of weights.

    Example:
        >>> groups_of({"layer.0.dense": 1}, {"layer.0.dense": 3})
        [{'targets': 'layer.0.dense', 'sparsity': 0.5}]
    """
    return [{"targets": name, "sparsity": _sparsity(count, sizes[name])} for name, count in kept.items()]


def _sparsity(kept: int, size: int) -> float:
    """Return the shortest decimal that a recipe turns into this number of kept weights."""
    middle = max(0.0, (size - kept - 0.5) / size)  # `kept_count` rounds down, so that edges would be a risk
    for digits in range(1, 18):
        if kept_count(size, found := round(middle, digits)) == kept:
            return found
    return middle


def check_total(sparsity: float, levels: Sequence[float] = ()) -> None:
    """Raise a `RecipeError` for a total sparsity outside of [0, 1) or above all levels."""
    if not 0 <= sparsity < 1:
        raise RecipeError(f"the total sparsity must be in [0, 1), got {sparsity}")
    if levels and sparsity > max(levels):
        raise RecipeError(
            f"the total sparsity must be at most the highest measured level, {max(levels)}, got {sparsity}: measure a "
            "higher one with --levels"
        )


def _total(sizes: Mapping[str, int], sparsity: float) -> int:
    check_total(sparsity)
    total = kept_count(sum(sizes.values()), sparsity)
    if total < len(sizes):
        raise RecipeError(
            f"sparsity {sparsity} leaves {total} weights for {len(sizes)} layers; each keeps at least one"
        )
    return total


def _curve(levels: Sequence[float], increases: Sequence[float]) -> list[tuple[float, float]]:
    points = [(0.0, 0.0)]
    for level, increase in zip(levels, increases, strict=True):
        points.append((level, max(points[-1][1], increase)))
    return points


def _inverse(curve: Sequence[tuple[float, float]], increase: float, highest: bool) -> float:
    """Return the sparsity at which a curve reaches an increase: the lowest one, or the highest."""
    if increase > curve[-1][1] or (highest and increase == curve[-1][1]):
        return curve[-1][0]
    for (before, low), (after, high) in itertools.pairwise(curve):
        if high > increase or (high == increase and not highest):
            return before if high == low else before + (after - before) * max(0.0, increase - low) / (high - low)
    return curve[-1][0]


def _whole(wanted: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round to whole numbers from 1 to the size, with this sum: the largest fractions are rounded up."""
    kept = {name: min(sizes[name], max(1, int(value))) for name, value in wanted.items()}
    while (missing := total - sum(kept.values())) != 0:
        step = 1 if missing > 0 else -1
        free = [name for name in kept if 1 <= kept[name] + step <= sizes[name]]
        free.sort(key=lambda name: step * (kept[name] - wanted[name]))
        for name in free[: abs(missing)]:
            kept[name] += step
    return kept
