"""Which layer of the student is compared with which layer of the teacher."""

from __future__ import annotations

from torch import Tensor

from ..config.distillation import DistillationConfig
from ..errors import RecipeError
from .losses import masked_mse


def uniform_pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return pairs of layers that spread the student's over the teacher's; the last is paired with the last.

    Example:
        >>> uniform_pairs(3, 12)
        [(0, 3), (1, 7), (2, 11)]
    """
    return [(layer, -(-(layer + 1) * teacher // student) - 1) for layer in range(student)]


def fixed_pairs(config: DistillationConfig, student: int, teacher: int) -> list[tuple[int, int]]:
    """Return the pairs of layers of a layer map that does not change; in place of "dynamic", the uniform one.

    Raises:
        RecipeError: if the map names a layer that does not exist.
    """
    if isinstance(config.layer_map, str):
        return uniform_pairs(student, teacher)
    for ours, theirs in config.layer_map:
        if ours >= student or theirs >= teacher:
            raise RecipeError(
                f"distillation: layer_map has the pair [{ours}, {theirs}], but the student has layers 0 to "
                f"{student - 1} and the teacher 0 to {teacher - 1}"
            )
    return [(pair[0], pair[1]) for pair in config.layer_map]


def nearest_pairs(
    student: list[Tensor],
    teacher: list[Tensor],
    teacher_layers: list[int],
    valid: Tensor | None = None,
    present: list[bool] | None = None,
) -> list[tuple[int, int]]:
    """Return pairs (student layer, teacher layer), from the top down, by the smallest distance of hidden states.

    Each teacher layer takes the nearest student layer below the last match, so that the order of layers is kept. Where
    no layer is left below, the teacher layer goes without.

    Args:
        student, teacher: one tensor of hidden states per layer.
        teacher_layers: numbers of the teacher layers to match, from 0.
        valid: as in `masked_mse`.
        present: which student layers are left; None = all.

    Example:
        >>> import torch
        >>> states = [torch.full((1, 1, 1), float(layer)) for layer in range(4)]
        >>> nearest_pairs(states, states, [1, 3])
        [(3, 3), (1, 1)]

    Source: Xia et al. 2022, "Structured Pruning Learns Compact and Accurate Models" (CoFi), section 3.2, with the
    choice restricted to layers that are present (the reference implementation masks sorted places instead of layers).
    """
    pairs: list[tuple[int, int]] = []
    above = len(student)
    for layer in sorted(teacher_layers, reverse=True):
        free = [index for index in range(above) if present is None or present[index]]
        if not free:
            break
        distances = [float(masked_mse(student[index].detach(), teacher[layer], valid)) for index in free]
        above = free[distances.index(min(distances))]
        pairs.append((above, layer))
    return pairs
