"""`hf-sparse bench` and `hf-sparse doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import BackendError, SparsityConfig, sparsify
from hf_sparse.bench import Comparison, Timing, compare, in_turns
from hf_sparse.cli import main
from hf_sparse.doctor import diagnose
from hf_sparse.kernels.int8 import why_not_int8
from hf_sparse.runtime import RuntimeReport
from hf_sparse.runtime.packed import Packed
from tests.structures import batch, build


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("bert")
    sparsify(model, SparsityConfig(sparsity=0.8))
    model.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def test_bench_says_what_was_measured_where(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    arguments = ["--backend", "csr", "--threads", "1", "--batch", "2", "--length", "8", "--rounds", "3", "--layers"]
    assert main(["bench", str(saved), *arguments, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    for said in ("batch x length: 2 x 8", "1 threads", "float32", "outputs differ by", "MB", "intermediate.dense"):
        assert said in text
    found = json.loads(out.read_text())
    assert found["difference"] < 1e-5
    assert found["runtime"]["bytes"] < found["dense"]["bytes"]
    assert found["dense"]["seconds"] == sorted(found["dense"]["seconds"])
    assert found["report"]["backend"] == "csr"


@pytest.mark.skipif(why_not_int8() is not None, reason=f"no int8 products here: {why_not_int8()}")
def test_bench_takes_int8_and_says_how_far_off_it_is(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    arguments = ["--backend", "cpu-int8", "--threads", "1", "--length", "8", "--rounds", "2", "--layers"]
    assert main(["bench", str(saved), *arguments, "--json", str(out)]) == 0
    assert "not exact" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert 1e-5 < found["difference"] < 0.1
    assert all(layer["error"] > 0 for layer in found["report"]["layers"] if layer["reason"] is None)


@pytest.mark.parametrize(
    ("arguments", "reason"), [(["--batch", "0"], "batch is at least 1"), (["--length", "99"], "32 positions")]
)
def test_bench_says_what_is_wrong(saved: Path, capsys: Any, arguments: list[str], reason: str) -> None:
    assert main(["bench", str(saved), *arguments]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("gain", "said"), [(1.01, "no speed-up"), (0.5, "no speed-up"), (2.0, "2.00x as fast")])
def test_no_speed_up_is_called_that(gain: float, said: str) -> None:
    timing = Timing((1.0, 1.0, 1.0), 1)
    report = RuntimeReport("auto", "", "", ())
    assert said in str(Comparison({}, 0.0, timing, timing, (gain, gain, gain), report))


def test_other_outputs_are_an_error_and_not_timed() -> None:
    first, second = build("bert"), build("bert", seed=1)
    with pytest.raises(BackendError, match="no rounding"):
        compare(first, second, batch("bert"))


def test_runs_take_turns_in_both_orders() -> None:
    order: list[str] = []
    in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm=0)
    assert order == ["a", "b", "b", "a"]


def test_doctor_verifies_the_kernels_and_finds_wrong_ones(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "C++ kernels" in text
    assert text.count("verified") == (3 if why_not_int8() is None else 2)
    monkeypatch.setattr(Packed, "multiply", lambda self, x, bias: torch.zeros(len(x), self.out_features))
    wrong = {finding.name: finding for finding in diagnose().findings}
    assert not wrong["CSR products of torch"].works
    assert "WRONG" in wrong["CSR products of torch"].says
    assert why_not_int8() is not None or "WRONG" in wrong["int8 products"].says
