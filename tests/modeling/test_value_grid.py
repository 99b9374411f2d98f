"""Grids of rounded weights: scales by hand, and every weight on a grid is found to be."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.modeling.value_grid import GRIDS, shortened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits_are_rounded_up_by_hand(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, 1.0, 1.1, 3.0, 5.0, 2.0**-120 * 1.4], dtype=dtype)
    assert shortened(numbers, 2).tolist() == [0.0, 1.0, 1.5, 3.0, 6.0, 2.0**-120 * 1.5]
    assert torch.equal(shortened(numbers, 60), numbers)


@pytest.mark.parametrize("bits", GRIDS)
def test_weight_on_a_grid_is_found_whatever_its_steps(bits: int) -> None:
    grid = GRIDS[bits]
    for most in (1, 2, grid.steps // 2 + 1, grid.steps):
        steps = torch.randint(-most, most + 1, (300, 3 * grid.group)) * (torch.rand(300, 3 * grid.group) < 0.5)
        scales = shortened(torch.rand(300, 3, 1) * 10.0 ** torch.randint(-9, 9, (300, 3, 1)), grid.exact_digits)
        weight = grid.grouped(steps.float()) * scales
        assert torch.equal(weight.bfloat16().float(), weight), "bfloat16 holds it"
        found = grid.scales(weight)
        assert torch.equal(grid.steps_of(weight, found) * found, weight)


@pytest.mark.parametrize("bits", GRIDS)
def test_other_weights_are_rounded_to_the_nearest_step_of_the_largest(bits: int) -> None:
    grid = GRIDS[bits]
    weight = grid.grouped(torch.randn(50, 2 * grid.group))
    scales = grid.scales(weight)
    largest = weight.abs().amax(-1, keepdim=True)
    assert bool((scales * grid.steps >= largest * 0.999999).all())
    assert bool((scales * grid.steps <= largest * (1 + 2.0 ** (1 - grid.digits))).all())
    error = (grid.steps_of(weight, scales) * scales - weight).abs()
    assert bool((error <= scales / 2 * 1.00001).all())
    assert bool((error <= grid.error * largest * 1.00001).all())


def test_one_value_off_the_grid_is_enough() -> None:
    weight = torch.full((1, 64), 0.5)
    weight[0, 40] = 0.3
    assert GRIDS[4].scales(weight).item() == 0.0625
    weight[0, 40] = 0.0
    assert GRIDS[4].scales(weight).item() == 0.5


def test_nothing_and_tiny_numbers_have_no_scale() -> None:
    assert GRIDS[8].scales(torch.tensor([[0.0, 0.0], [1e-40, 0.0]])).tolist() == [[0.0], [0.0]]
    assert GRIDS[4].scales(torch.zeros(0, 3, 64)).shape == (0, 3, 1)
    assert GRIDS[4].grouped(torch.zeros(2, 0)).shape == (2, 0, 64)
