"""Selection without sorting is selection with sorting: the same entries, for every layout of scores."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse import SparsityError
from hf_sparse.pruning.selection import topk as kth
from hf_sparse.pruning.selection.topk import keep_highest
from hf_sparse.pruning.selection.topk_radix import keep_highest_alone


def by_sorting(scores: list[Tensor], keep: int) -> list[Tensor]:
    flat = torch.cat([tensor.reshape(-1) for tensor in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:keep]] = True
    parts = mask.split([tensor.numel() for tensor in scores])
    return [part.view(tensor.shape) for part, tensor in zip(parts, scores, strict=True)]


def check(scores: list[Tensor], keep: int) -> None:
    masks, _ = keep_highest(scores, keep)
    for ours, theirs in zip(masks, by_sorting(scores, keep), strict=True):
        assert torch.equal(ours, theirs)


FEW_VALUES = st.sampled_from([-float("inf"), -1.0, -0.0, 0.0, 0.5, 2.0, float("inf")])
ROWS = st.lists(st.lists(FEW_VALUES | st.floats(width=32, allow_nan=False), min_size=1, max_size=30), max_size=4)


@given(st.lists(st.lists(FEW_VALUES, min_size=1, max_size=30), min_size=1, max_size=4), st.data())
def test_small_scores_with_many_ties(rows: list[list[float]], data: st.DataObject) -> None:
    scores = [torch.tensor(row) for row in rows]
    check(scores, data.draw(st.integers(0, sum(map(len, rows)))))


@given(ROWS.filter(bool), st.integers(1, 40), st.data())
def test_any_sample_of_any_scores_leads_to_the_same(rows: list[list[float]], sample: int, data: st.DataObject) -> None:
    scores = [torch.tensor(row) for row in rows]
    with mock.patch.multiple(kth, _SMALL=1, _SAMPLE=sample):  # so that few scores take the way of many
        check(scores, data.draw(st.integers(0, sum(map(len, rows)))))


BRACKETS = [(5.0, 6.0), (-6.0, -5.0), (1.0, -1.0), (float("inf"),) * 2, (-float("inf"),) * 2, (0.0, 0.0), (0.0, 0.1)]


@pytest.mark.parametrize("bracket", BRACKETS)
@pytest.mark.parametrize("keep", [1, 2, 20_000, 39_999])
def test_sample_that_misses_the_cut_is_noticed(bracket: tuple[float, float], keep: int) -> None:
    scores = normal(40_000)
    with mock.patch.object(kth, "_bracket", return_value=bracket):
        check([scores], keep)


@pytest.mark.parametrize("size", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1])
@pytest.mark.parametrize("keep", [1, 2, 3_277, -2, -1])
def test_scores_around_the_size_where_sampling_begins(size: int, keep: int) -> None:
    check([(normal(size) * 100).round()], keep % size)


def normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


LAYOUTS = {
    "normal": normal,
    "constant": lambda n: torch.full((n,), 3.0),
    "two values": lambda n: (normal(n) > 0).float(),
    "rising": lambda n: torch.arange(n, dtype=torch.float32),
    "falling": lambda n: -torch.arange(n, dtype=torch.float32),
    "outliers": lambda n: torch.where(torch.arange(n) % 1000 == 0, normal(n) * 1e30, normal(n) * 1e-30),
    "tie at the cut": lambda n: torch.where(torch.arange(n) % 3 == 0, 0.0, normal(n)),
    "infinities": lambda n: torch.where(torch.arange(n) % 5 == 0, float("inf"), normal(n)),
    "half zero": lambda n: normal(n).clamp(min=0.0),
    "minus infinities": lambda n: torch.where(torch.arange(n) % 5 < 4, -float("inf"), normal(n)),
    "zeros of both signs": lambda n: torch.where(torch.arange(n) % 2 == 0, -0.0, normal(n).clamp(max=0.0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.03, 0.1, 0.5, 0.97, 1.0])
def test_large_scores_are_selected_as_by_sorting(layout: str, share: float) -> None:
    scores = LAYOUTS[layout](100_003)
    keep = min(max(int(share * scores.numel()), 1 if share else 0), scores.numel())
    check([scores], keep)
    check([scores[:60_000].view(300, 200), scores[60_000:]], keep)  # and over several weights together


SPECIAL = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-45, 1e-40, 1.0, -1.0])


def random_case(seed: int) -> tuple[list[Tensor], int]:
    """Return scores in several tensors, among them ties, zeros of both signs, infinities and denormals, and a count."""
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for size in torch.randint(1, 3000, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator):
        values = torch.randn(int(size), generator=generator)
        if seed % 2:
            values = (values * 4).round() / 4  # many ties
        special = SPECIAL[torch.randint(len(SPECIAL), values.shape, generator=generator)]
        values = torch.where(torch.rand(values.shape, generator=generator) < seed % 5 / 4, special, values)
        scores.append(values.bfloat16() if seed % 3 == 0 else values)
    total = sum(tensor.numel() for tensor in scores)
    return scores, int(torch.randint(0, total + 1, (), generator=generator))


@pytest.mark.parametrize("small", [1, kth._SMALL])
def test_thousand_random_cases_against_a_full_sort(small: int) -> None:
    with mock.patch.multiple(kth, _SMALL=small, _SAMPLE=100):
        for seed in range(1000):
            check(*random_case(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_devices_select_the_same(layout: str) -> None:
    scores = LAYOUTS[layout](5_000)
    parts = [scores[:2_000].view(40, 50), scores[2_000:]]
    for keep in (1, 500, 2_500, 4_999):
        masks, cut = keep_highest_alone(parts, keep)
        expected, same_cut = keep_highest(parts, keep)
        assert cut == same_cut
        assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


def test_thousand_random_cases_as_on_other_devices() -> None:
    for seed in range(1000):
        scores, keep = random_case(seed)
        if not 0 < keep < sum(tensor.numel() for tensor in scores):
            continue
        masks, cut = keep_highest_alone(scores, keep)
        assert all(torch.equal(a, b) for a, b in zip(masks, by_sorting(scores, keep), strict=True)), seed
        assert cut == min(float(t[mask].min()) for t, mask in zip(scores, masks, strict=True) if bool(mask.any()))


def test_other_devices_put_nothing_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("cat", "sort"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    masks, _ = keep_highest_alone([normal(500), normal(700)], 300)
    assert sum(int(mask.sum()) for mask in masks) == 300


def test_the_random_state_of_training_is_left_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    keep_highest([normal(50_000)], 100)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_other_types_and_of_several_are_selected_by_value(dtype: torch.dtype) -> None:
    rough = normal(300).to(dtype)
    masks, cut = keep_highest([rough, normal(300)], 100)
    expected = by_sorting([rough.float(), normal(300)], 100)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert cut == min(float(rough[masks[0]].min()), float(normal(300)[masks[1]].min()))


def test_scores_need_not_be_contiguous_and_may_be_parameters() -> None:
    scores = torch.nn.Parameter(torch.tensor([[1.0, 4.0], [3.0, 2.0], [5.0, 0.0]]))
    masks, _ = keep_highest([scores.t()], 3)
    assert masks[0].tolist() == [[False, True, True], [True, False, False]]


def test_nothing_and_everything_can_be_kept() -> None:
    scores = [torch.zeros(2, 2), torch.zeros(3)]
    for keep, kept in ((0, False), (7, True), (9, True)):
        masks, cut = keep_highest(scores, keep)
        assert [mask.tolist() for mask in masks] == [[[kept] * 2] * 2, [kept] * 3]
        assert cut is None


@pytest.mark.parametrize("others", [0.0, float("inf"), -float("inf")])
def test_nan_does_not_hide_behind_ties(others: float) -> None:
    with pytest.raises(SparsityError, match="NaN among the scores"):
        keep_highest([torch.tensor([float("nan"), others, others, others])], 2)


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_nan_is_an_error(size: int, share: float) -> None:
    scores = normal(size)
    scores[size // 3] = float("nan")
    with pytest.raises(SparsityError, match="NaN among the scores"):
        keep_highest([scores], max(1, int(share * size)))
