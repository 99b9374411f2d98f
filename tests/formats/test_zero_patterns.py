"""Zeros are recognized by what they leave: hand-made matrices of every pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse.formats.zero_patterns import find_pattern, looks_sparse


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def masked(kept: Tensor) -> Tensor:
    return rand(*kept.shape) * kept


def random_blocks(rows: int, cols: int) -> Tensor:
    return (rand(128 // rows, 128 // cols, seed=1) < 0.5).repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def of_four(count: int) -> Tensor:
    return masked((rand(64, 32, 4, seed=3).argsort(-1) < count).view(64, 128))


@pytest.mark.parametrize(
    ("weight", "pattern"),
    [
        (masked(torch.ones(64, 64)), "dense"),
        (torch.zeros(64, 64), "zero"),
        (masked(rand(128, 128, seed=2) < 0.6), "element"),
        (masked(rand(128, 128, seed=2) < 0.2), "element"),
        (of_four(2), "2:4"),
        (of_four(1), "1:4"),
        (masked((torch.arange(128) % 3 == 0)[:, None].expand(128, 64)), "row"),
        (masked((torch.arange(128) % 3 == 0)[None].expand(64, 128)), "column"),
        (masked((torch.arange(96) % 3 == 0)[:, None] & (torch.arange(128) < 50)), "row+column"),
        *(
            (masked(random_blocks(*block)), "block {}x{}".format(*block))
            for block in ((32, 32), (4, 1), (1, 8), (16, 4))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pattern_of_a_hand_made_weight(weight: Tensor, pattern: str) -> None:
    assert find_pattern(weight) == pattern


def test_few_more_zeros_do_not_hide_a_pattern() -> None:
    weight = of_four(2)
    nonzero = weight.nonzero()[:30]
    weight[nonzero[:, 0], nonzero[:, 1]] = 0
    assert find_pattern(weight) == "2:4"


def test_sides_that_no_block_divides_are_elements() -> None:
    assert find_pattern(masked(rand(37, 41, seed=5) < 0.5)) == "element"


@pytest.mark.parametrize(
    ("key", "zeros", "expected"),
    [
        ("a.query.weight", 0.5, True),
        ("a.query.weight", 0.05, False),
        ("a.query.bias", 0.5, False),
        ("embeddings.word_embeddings.weight", 0.5, False),
        ("transformer.wte.weight", 0.5, False),
    ],
)
def test_zeros_of_a_name_look_like_intent(key: str, zeros: float, expected: bool) -> None:
    weight = torch.ones(20, 20)
    weight.view(-1)[: int(400 * zeros)] = 0
    assert looks_sparse(key, weight) is expected
