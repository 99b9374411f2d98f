"""The kernel for a few tokens in models that generate: chosen where it needs less time, and the same numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.kernels import LibraryStatus
from hf_sparse.modeling.value_grid import GRIDS
from hf_sparse.profiling.timer import Run
from hf_sparse.runtime import SpeedTable, lm_head
from hf_sparse.runtime.autotune import Measurement, Trial, why_dense
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, round_to_bfloat16, sparse, table
from tests.helpers.structures import batch


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None, bitmask=None)


def rounded(family: str) -> Any:
    """Return a sparse model whose values bfloat16 holds exactly."""
    model = sparse(family, 0.5)
    round_to_bfloat16(model)
    return model


def test_decoder_takes_bits_where_they_need_less_time_and_the_encoder_does_not(tmp_path: Path) -> None:
    model, inputs = rounded("t5"), batch("t5")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = answers(model, inputs)
    options = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(**options)
    report = to_runtime(model, "auto", table=table(tmp_path, bitmask=0.1))
    kernels = {layer.name: layer.kernel for layer in report.layers}
    assert {kernels[name] for name in kernels if name.startswith("decoder.")} == {"bitmask"}
    assert "bitmask" not in {kernels[name] for name in kernels if name.startswith("encoder.")}
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        assert torch.equal(twin.generate(**options), generated)
    to_dense_runtime(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_lm_head_reads_a_copy_in_bfloat16_beside_the_tied_weight(tmp_path: Path) -> None:
    model = rounded("t5")
    weight = model.lm_head.weight
    assert weight is model.shared.weight
    one, many = torch.randn(1, 1, weight.shape[1]), torch.randn(2, 9, weight.shape[1])
    expected = [torch.nn.functional.linear(x, weight) for x in (one, many)]
    report = to_runtime(model, "auto", table=table(tmp_path, bitmask=0.1))
    head = next(layer for layer in report.layers if layer.name == "lm_head")
    assert "a copy in bfloat16" in str(head.reason)
    assert head.bytes == head.dense_bytes + lm_head.extra_bytes(model.lm_head)
    assert 0.5 < lm_head.extra_bytes(model.lm_head) / weight.nbytes < 1, "2 bytes, and a bit, of 4"
    assert model.lm_head.weight is weight is model.shared.weight
    for x, out in zip((one, many), expected, strict=True):
        torch.testing.assert_close(model.lm_head(x), out, atol=1e-5, rtol=1e-5)
    to_dense_runtime(model)
    assert not lm_head.extra_bytes(model.lm_head)
    assert type(model.lm_head) is torch.nn.Linear


def test_lm_head_that_is_changed_is_read_itself(tmp_path: Path) -> None:
    model = rounded("t5")
    to_runtime(model, "auto", table=table(tmp_path, bitmask=0.1))
    twin = copy.deepcopy(model)
    x, many = torch.randn(1, 1, model.lm_head.in_features), torch.randn(2, 9, model.lm_head.in_features)
    changes: list[Callable[[Any], Any]] = [
        lambda head: head.weight[2:5].fill_(1.0),
        lambda head: head.load_state_dict({"weight": torch.ones_like(head.weight)}),
        lambda head: setattr(head, "weight", torch.nn.Parameter(torch.randn_like(head.weight))),
    ]
    for each in (model, twin):
        assert each.lm_head.few_token_stamp.fits(each.lm_head.weight)
        each.share_memory()
        each.lm_head(x)
        assert each.lm_head.few_token_stamp.fits(each.lm_head.weight), "the values are the same"
        for change in changes:
            with torch.no_grad():
                change(each.lm_head)
                for tokens in (x, many):
                    expected = torch.nn.functional.linear(tokens, each.lm_head.weight)
                    torch.testing.assert_close(each.lm_head(tokens), expected, atol=1e-5, rtol=1e-5)


def test_lm_head_that_bfloat16_cannot_hold_has_no_copy(tmp_path: Path) -> None:
    model = sparse("t5", 0.5)
    to_runtime(model, "auto", table=table(tmp_path, bitmask=0.1))
    assert type(model.lm_head) is not torch.nn.Linear
    assert not lm_head.extra_bytes(model.lm_head)


def test_whole_sub_blocks_stay_where_they_need_less_time(tmp_path: Path) -> None:
    report = to_runtime(rounded("t5"), "auto", table=table(tmp_path, bitmask=0.4, sparse_ffn=0.3, sparse_qkv=0.3))
    kernels = {layer.name: layer.kernel for layer in report.layers}
    assert kernels["decoder.block.0.layer.2.DenseReluDense.wi"] == "sparse_ffn"
    assert kernels["decoder.block.0.layer.1.EncDecAttention.q"] == "bitmask"


def test_models_that_do_not_generate_are_not_timed_with_it(tmp_path: Path) -> None:
    timed: list[str] = []

    def clock(trial: Trial, dense: Run, packed: Run) -> Measurement:
        timed.append(trial.kind)
        return Measurement(1.0, 0.5, 2.0)

    to_runtime(sparse("bert"), "auto", table=SpeedTable(tmp_path / "runtime.json", clock))
    assert timed
    assert "bitmask" not in timed


def test_backend_by_name_packs_every_sparse_layer() -> None:
    model, inputs = sparse("bert"), batch("bert")
    expected = answers(model, inputs)
    report = to_runtime(model, "bitmask")
    assert {layer.kernel for layer in report.sparse} == {"bitmask"}
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_kernel_that_gains_at_few_tokens_must_not_lose_at_many() -> None:
    faster, equal, slower = (Measurement(1.0, seconds, 1.0 / seconds) for seconds in (0.5, 1.01, 1.1))
    assert why_dense("bitmask", {1: faster, 17: faster, 1024: equal}) is None
    assert "at 1024 tokens" in str(why_dense("bitmask", {1: faster, 17: faster, 1024: slower}))
    assert "at 1 token" in str(why_dense("bitmask", {1: equal, 17: faster, 1024: faster}))
    assert "at 1024 tokens" in str(why_dense("sparse_ffn", {17: faster, 1024: equal})), "nothing gains from few tokens"


@pytest.mark.parametrize(("bits", "most", "of_the_model"), [(8, 0.02, 0.1), (4, 0.12, 0.6)])
def test_rounded_by_name_reports_its_errors_and_restores_the_bits(bits: int, most: float, of_the_model: float) -> None:
    model, inputs = rounded("t5"), batch("t5")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = answers(model, inputs)
    report = to_runtime(model, f"bitmask-int{bits}")
    by_name = {layer.name: layer for layer in report.layers}
    assert all(0 < float(layer.error or 0) < most for layer in report.sparse)
    assert all(0 < float(layer.weight_error or 0) < most for layer in report.sparse)
    assert 0 < float(by_name["lm_head"].error or 0) < 0.02, "never less than int8"
    found = answers(model, inputs)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < of_the_model
    to_dense_runtime(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_of_the_kernel_lose_nothing_and_are_kept_once(bits: int) -> None:
    model, inputs, grid = sparse("t5", 0.5), batch("t5"), GRIDS[bits]
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                grouped = grid.grouped(layer.weight)
                scales = grid.scale_of(grouped, grid.exact_digits)
                on_grid = (grid.steps_of(grouped, scales) * scales).flatten(1)
                layer.weight.copy_(on_grid[:, : layer.in_features])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dense = copy.deepcopy(model)
    report = to_runtime(model, f"bitmask-int{bits}")
    assert {layer.weight_error for layer in report.sparse} == {0.0}
    assert all(float(layer.error or 0) < 0.02 for layer in report.sparse), "of the rounded inputs alone"
    assert "none of the weight" in str(report)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed
    assert not any(module.packed.exact or module.exact_names for module in packed), "no exact weight beside it"
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
        found, expected = answers(twin, inputs), answers(dense, inputs)
        assert float((found - expected).norm() / expected.norm()) < 0.1
    to_dense_runtime(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_rounded_lm_head_is_rounded_at_any_number_of_tokens() -> None:
    model = rounded("t5")
    to_runtime(model, "bitmask-int8")
    x = torch.randn(30, model.lm_head.in_features)
    one_by_one = torch.cat([model.lm_head(row[None]) for row in x])
    torch.testing.assert_close(model.lm_head(x), one_by_one, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one_by_one, torch.nn.functional.linear(x, model.lm_head.weight), atol=1e-5)
