"""What `to_runtime` times, and what it then packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import BackendError, to_runtime
from hf_sparse.runtime import SpeedTable, is_runtime
from hf_sparse.runtime.autotune import Measurement, Trial
from tests.helpers.kernels import built_for_test
from tests.helpers.runtime_models import Fixed, sparse, table
from tests.runtime.converted import kernels_of, sparse_linear


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for_test(monkeypatch, "cpu", "dense_few")


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_auto_keeps_dense_where_dense_wins(tmp_path: Any) -> None:
    model = sparse("bert")
    report = to_runtime(model, table=table(tmp_path, sparse_attention=0.98, sparse_linear=2.0, sparse_ffn=0.25))
    found = kernels_of(report)
    assert {found[f"bert.encoder.layer.0.attention.self.{part}"] for part in ("query", "key", "value")} == {"dense"}
    assert found["bert.encoder.layer.0.intermediate.dense"] == "sparse_ffn"
    by_name = {layer.name: layer for layer in report.layers}
    dense = by_name["bert.encoder.layer.0.attention.output.dense"]
    assert dense.reason is not None
    assert "dense is faster" in dense.reason
    assert dense.gains[200] == 0.5
    assert by_name["bert.encoder.layer.0.output.dense"].gains[200] == 4.0
    assert type(model.bert.encoder.layer[0].attention.output.dense) is nn.Linear


def test_auto_takes_the_layers_of_a_company_that_loses_one_by_one(tmp_path: Any) -> None:
    report = to_runtime(sparse("bert"), table=table(tmp_path, sparse_attention=1.0, sparse_ffn=1.0, sparse_linear=0.5))
    assert {layer.kernel for layer in report.sparse} == {"sparse_linear"}
    assert len(report.sparse) == 12


def test_model_of_which_nothing_wins_stays_as_it_is(tmp_path: Any) -> None:
    model = sparse("bert").requires_grad_(True)
    report = to_runtime(model, table=table(tmp_path, sparse_attention=1.0, sparse_ffn=1.0, sparse_linear=1.0))
    assert not report.sparse
    assert not is_runtime(model)
    assert all(own.requires_grad for own in model.parameters())


def test_each_shape_is_timed_once_and_kept(tmp_path: Any) -> None:
    clock = Fixed()
    first = table(tmp_path)
    first.clock = clock
    to_runtime(sparse("bert"), table=first)
    assert len(clock.asked) == len(set(clock.asked))
    asked = {(trial.kind, trial.tokens) for trial in clock.asked}
    assert {tokens for _, tokens in asked} == {1, 2, 3, 4, 7, 9, 15, 17, 65, 200, 1024}
    again = table(tmp_path)
    to_runtime(sparse("bert"), table=again)
    assert again.clock.asked == []  # type: ignore[attr-defined]


def test_model_that_generates_is_timed_with_one_token_too(tmp_path: Any) -> None:
    times = table(tmp_path)
    to_runtime(sparse("t5"), table=times)
    assert {1, 2, 5, 8} < {trial.tokens for trial in times.clock.asked}  # type: ignore[attr-defined]


def test_encoder_of_a_model_that_generates_is_timed_with_whole_texts_alone(tmp_path: Any) -> None:
    class FewLose(Fixed):
        def __call__(self, trial: Trial, dense: Any, packed: Any) -> Any:
            return super().__call__(trial, dense, packed) if trial.tokens > 8 else Measurement(1.0, 2.0, 0.5)

    times = table(tmp_path)
    times.clock = FewLose()
    report = to_runtime(sparse("t5"), table=times)
    assert report.sparse
    assert all(layer.name.startswith("encoder.") for layer in report.sparse)
    assert not [layer for layer in report.layers if layer.name.startswith("encoder.") and layer not in report.sparse]


def test_numbers_of_tokens_can_be_named(tmp_path: Any) -> None:
    times = table(tmp_path)
    to_runtime(sparse("t5"), tokens=(64, 32), table=times)
    assert {trial.tokens for trial in times.clock.asked} == {32, 64}  # type: ignore[attr-defined]
    for wrong in ((), (0, 3), 128, (1.5,), ("a", "b"), "12"):
        with pytest.raises(BackendError, match="`tokens` must be"):
            to_runtime(sparse("bert"), tokens=wrong, table=times)  # type: ignore[arg-type]


def test_file_of_times_that_is_spoilt_is_measured_anew(tmp_path: Any) -> None:
    for text in ("", '{"a": [1, 2', "[]", "[" * 100_000, '{"a": ["x"]}', '{"a": [NaN, 1, 1]}'):
        (tmp_path / "runtime.json").write_text(text)
        assert to_runtime(sparse("bert"), table=table(tmp_path)).sparse
        assert len(table(tmp_path).cache.read()) > 1


@pytest.mark.parametrize(
    ("measured", "faster"),
    [
        (Measurement(1.0, 0.5, 1.9), True),
        (Measurement(1.0, 0.97, 1.02), False),  # less than the margin
        (Measurement(1.0, 0.9, 0.99), False),  # slower in one round of four
        (Measurement(1.0, 1.2, 0.8), False),
    ],
)
def test_packed_product_wins_by_a_margin_and_in_most_rounds(measured: Measurement, faster: bool) -> None:
    assert measured.is_faster is faster


def test_one_number_of_tokens_that_loses_keeps_the_layer_dense(tmp_path: Any) -> None:
    def clock(trial: Trial, dense: Any, packed: Any) -> Measurement:
        return Measurement(1.0, 1.1, 0.9) if trial.tokens == 65 else Measurement(1.0, 0.2, 4.9)

    report = to_runtime(sparse("bert"), table=SpeedTable(tmp_path / "t.json", clock))
    assert not report.sparse
    assert "at 65 tokens" in str(report.layers[0].reason)


def test_race_takes_the_real_modules(tmp_path: Any) -> None:
    found = []

    def clock(trial: Trial, dense: Any, packed: Any) -> Measurement:
        one, other = dense(), packed()
        for a, b in zip(*(each if isinstance(each, list) else [each] for each in (one, other)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        found.append(trial.kind)
        return Measurement(1.0, 0.2, 4.9)

    for family in ("bert", "t5-gated"):
        with torch.no_grad():
            to_runtime(sparse(family), table=SpeedTable(tmp_path / f"{family}.json", clock))
    assert set(found) == {"sparse_linear", "sparse_qkv", "sparse_attention", "sparse_ffn", "dense_few", "bitmask"}


def test_real_times_are_measured_and_positive(tmp_path: Any) -> None:
    report = to_runtime(nn.Sequential(sparse_linear()).eval(), table=SpeedTable(tmp_path / "t.json"))
    (layer,) = report.layers
    assert {17, 65, 200, 1024} <= set(layer.gains) <= {1, 2, 3, 4, 7, 9, 15, 17, 65, 200, 1024}
    assert all(gain > 0 for gain in layer.gains.values())


def test_blocks_set_the_height() -> None:
    for rows in (1, 4, 16):
        model: Any = nn.Sequential(nn.Linear(64, 64, bias=False)).eval()
        kept = torch.rand(64 // rows, 64) < 0.2
        with torch.no_grad():
            model[0].weight.mul_(kept.repeat_interleave(rows, dim=0))
        assert to_runtime(model, "cpu").layers[0].rows in ({16, 8} if rows == 16 else {rows})
