"""Wanda and SparseGPT against the formulas of their papers in float64: the same masks, the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import SparsityConfig, sparsify
from hf_sparse.errors import RecipeError
from hf_sparse.runtime.packed_weight import Packed
from tests.helpers import oneshot

SPARSITY: dict[str, Any] = {"sparsity": 0.5}
CASES: list[tuple[int, int, dict[str, Any], oneshot.NM | None]] = [
    (24, 64, {"sparsity": 0.5}, None),
    (23, 37, {"sparsity": 0.6}, None),
    (7, 301, {"sparsity": 0.3}, None),
    (16, 64, {"pattern": "2:4"}, (2, 4)),
    (9, 200, {"pattern": "4:8"}, (4, 8)),
    (5, 42, {"pattern": "1:3"}, (1, 3)),
]
IDS = [f"{rows}x{columns}-{next(iter(options.values()))}" for rows, columns, options, _ in CASES]


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(rows * columns)
    return nn.Sequential(nn.Linear(columns, rows)).to(dtype)


def inputs(columns: int, tokens: int = 500, dead: tuple[int, ...] = ()) -> Tensor:
    """Return inputs that depend on each other, of very different sizes, as those of transformers do."""
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(tokens, columns, generator=generator)
    mixed = mixed @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5)
    mixed *= torch.rand(columns, generator=generator) * 3 + 0.05
    mixed[:, list(dead)] = 0.0
    return mixed


def pruned(model: Any, x: Tensor, **group: Any) -> Tensor:
    """Prune a model with the inputs in batches of different sizes."""
    batches = [{"input": part} for part in x.split([len(x) // 5, len(x) - len(x) // 5])]
    sparsify(model, SparsityConfig(targets="*", **group), batches)
    return model[0].weight.detach()


def check(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dead", [(), (0, 5, 6, 17)], ids=["all-alive", "dead-columns"])
@pytest.mark.parametrize(("rows", "columns", "options", "nm"), CASES, ids=IDS)
def test_sparsegpt(rows: int, columns: int, options: Any, nm: oneshot.NM | None, dead: tuple[int, ...]) -> None:
    x, model = inputs(columns, dead=dead), layer(rows, columns)
    expected = oneshot.sparsegpt(model[0].weight.detach(), x, options.get("sparsity", 0.5), nm)
    check(pruned(model, x, scorer="sparsegpt", **options), expected)


@pytest.mark.parametrize("dead", [(), (0, 5, 6, 17)], ids=["all-alive", "dead-columns"])
@pytest.mark.parametrize(("rows", "columns", "options", "nm"), CASES, ids=IDS)
def test_wanda(rows: int, columns: int, options: Any, nm: oneshot.NM | None, dead: tuple[int, ...]) -> None:
    x, model = inputs(columns, dead=dead), layer(rows, columns)
    expected = oneshot.wanda(model[0].weight.detach(), x, options.get("sparsity", 0.5), nm)
    check(pruned(model, x, scorer="wanda", **options), expected, 0.0)  # what is kept does not change at all


def test_sparsegpt_in_float64_is_the_formula_to_the_last_digits() -> None:
    x, model = inputs(90, dead=(3,)).double(), layer(20, 90, torch.float64)
    expected = oneshot.sparsegpt(model[0].weight.detach(), x, 0.5, damping=0.1, block=32)
    found = pruned(model, x, scorer={"name": "sparsegpt", "damping": 0.1, "block": 32}, sparsity=0.5)
    check(found, expected, 1e-11)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_sparsegpt_with_bits_is_the_formula(bits: int, nm: oneshot.NM | None) -> None:
    x, model = inputs(300, dead=(3, 70)).double(), layer(13, 300, torch.float64)
    expected = oneshot.sparsegpt(model[0].weight.detach(), x, 0.6, nm, bits=bits)
    group: dict[str, Any] = {"sparsity": 0.6} if nm is None else {"pattern": "2:4"}
    found = pruned(model, x, scorer={"name": "sparsegpt", "bits": bits}, **group)
    check(found, expected, 1e-12)
    assert float((found == 0).double().mean()) >= group.get("sparsity", 0.5) - 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_sparsegpt_with_bits_leaves_what_the_kernel_holds_exactly(bits: int, dtype: torch.dtype) -> None:
    x, model = inputs(300).to(dtype), layer(40, 300, dtype)
    found = pruned(model, x, scorer={"name": "sparsegpt", "bits": bits, "block": 100}, sparsity=0.5).float()
    packed = Packed.of(found, f"bitmask-int{bits}")
    assert torch.equal(packed.multiplied(), found)
    assert packed.errors(found).weight == 0.0
    assert not packed.exact, "nothing is kept beside values that are exact"


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_behind_make_up_for_the_rounding(bits: int) -> None:
    x = inputs(256)
    apart, joint = layer(32, 256), layer(32, 256)
    dense = apart[0].weight.detach().clone()
    unrounded = pruned(apart, x, scorer="sparsegpt", sparsity=0.5)
    later = Packed.of(unrounded, f"bitmask-int{bits}").multiplied()
    found = pruned(joint, x, scorer={"name": "sparsegpt", "bits": bits}, sparsity=0.5)
    error, least, rounded_later = (float((x @ (new - dense).T).square().sum()) for new in (found, unrounded, later))
    if bits == 4:
        assert error < rounded_later
    else:
        assert error < 1.02 * least, "steps of int8 are so small that pruning is nearly all of the error"


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_for_a_scale_are_kept_and_said(bits: int, caplog: pytest.LogCaptureFixture) -> None:
    model, x = layer(8, 256), inputs(256)
    with torch.no_grad():
        model[0].weight[2] *= 1e-31
    found = pruned(model, x, scorer={"name": "sparsegpt", "bits": bits}, pattern="2:4")
    assert int(found[2].count_nonzero()) == 128
    assert "128 of 2048 weights of a layer as they are, not rounded" in caplog.text


def test_bits_that_no_kernel_has_and_what_would_undo_them_are_refused() -> None:
    with pytest.raises(RecipeError, match="`bits` must be one of 8, 4, got 3"):
        SparsityConfig(targets="*", sparsity=0.5, scorer={"name": "sparsegpt", "bits": 3})
    with pytest.raises(RecipeError, match="bits=4 leaves values that a kernel holds"):
        pruned(layer(8, 64), inputs(64), sparsity=0.5, scorer={"name": "sparsegpt", "bits": 4}, reconstruction="cg")


def test_sparsegpt_with_fewer_tokens_than_inputs() -> None:
    x, model = inputs(120, tokens=40).double(), layer(20, 120, torch.float64)
    expected = oneshot.sparsegpt(model[0].weight.detach(), x, 0.5)
    check(pruned(model, x, scorer="sparsegpt", sparsity=0.5), expected, 1e-9)


def test_second_layer_is_calibrated_with_what_the_pruned_first_gives() -> None:
    x = inputs(40).double()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).double()
    first = oneshot.sparsegpt(model[0].weight.detach(), x, 0.5)
    hidden = torch.relu(x @ first.T + model[0].bias.detach())
    expected = oneshot.sparsegpt(model[2].weight.detach(), hidden, 0.5)
    check(pruned(model, x, scorer="sparsegpt", sparsity=0.5), first, 1e-9)
    check(model[2].weight.detach(), expected, 1e-9)


def test_blocks_of_weights_compete_by_their_mean_score() -> None:
    x, model = inputs(16), layer(8, 16)
    weight = model[0].weight.detach()
    scores = (weight.abs() * x.double().square().sum(0).sqrt()).view(4, 2, 4, 4).mean((1, 3))
    kept = scores >= scores.sort(dim=1, descending=True).values[:, 1:2]  # two of four in each row of blocks
    expected = weight.double() * kept.repeat_interleave(2, 0).repeat_interleave(4, 1)
    pattern = {"name": "block", "rows": 2, "cols": 4}
    check(pruned(model, x, scorer="wanda", pattern=pattern, sparsity=0.5), expected, 0.0)


def test_sparsegpt_removes_whole_blocks_and_what_is_left_makes_up_for_them() -> None:
    x, model = inputs(24), layer(8, 24)
    dense = model[0].weight.detach().clone()
    pattern = {"name": "block", "rows": 4, "cols": 4}
    found = pruned(model, x, scorer={"name": "sparsegpt", "block": 10}, pattern=pattern, sparsity=0.5)
    blocks = (found != 0).view(2, 4, 6, 4).sum((1, 3))
    assert set(blocks.view(-1).tolist()) == {0, 16}
    assert int((blocks == 0).sum()) == 6
    error, masked = ((x @ (found - dense).T).square().sum(), (x @ (dense * (found != 0) - dense).T).square().sum())
    assert error < masked


def test_reconstruction_solves_the_least_squares_of_each_row() -> None:
    x, model = inputs(30).double(), layer(10, 30, torch.float64)
    dense = model[0].weight.detach().clone()
    cg = {"name": "cg", "steps": 60, "damping": 0.0}
    found = pruned(model, x, scorer="magnitude", sparsity=0.5, reconstruction=cg)
    mask = dense.abs() >= dense.abs().flatten().sort().values[150]
    assert torch.equal(found != 0, mask)
    for row in range(10):
        kept = mask[row]
        solution = torch.linalg.lstsq(x[:, kept], (x @ dense[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row, kept], solution, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("group", [{"sparsity": 0.6}, {"pattern": "2:4"}])
@pytest.mark.parametrize("scorer", ["magnitude", "wanda", "sparsegpt", "random"])
def test_reconstruction_lowers_the_error_of_every_mask(scorer: str, group: dict[str, Any]) -> None:
    x = inputs(64, dead=(2,))
    errors = {}
    for reconstruction in (None, "cg"):
        model = layer(16, 64)
        dense = model[0].weight.detach().clone()
        if scorer in ("magnitude", "random") and reconstruction is None:
            sparsify(model, SparsityConfig(targets="*", scorer=scorer, **group))
            found = model[0].weight.detach()
        else:
            found = pruned(model, x, scorer=scorer, reconstruction=reconstruction, **group)
        errors[reconstruction] = float((x @ (found - dense).T).square().sum())
        assert float((found == 0).float().mean()) == pytest.approx(group.get("sparsity", 0.5), abs=0.01)
    assert errors["cg"] < errors[None]
