"""The part of scripts/verify_gpu.py that can be tried on a CPU."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_gpu.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_layers_go_into_runtime_form_and_back(script: dict[str, Any]) -> None:
    rows = script["runtime"]("cpu", torch.float32, 64)
    assert [row["check"] for row in rows] == ["to_runtime, 2:4", "to_runtime, blocks"]
    assert all(row["ok"] and row["same"] and len(row["layers"]) == 2 for row in rows), rows


def test_runtime_form_that_computes_something_else_is_wrong(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_sparse

    real = hf_sparse.to_runtime

    def spoilt(model: Any, **options: Any) -> Any:
        model[2].bias.data.add_(1.0)
        return real(model, **options)

    monkeypatch.setattr(hf_sparse, "to_runtime", spoilt)
    assert [row["ok"] for row in script["runtime"]("cpu", torch.float32, 64)] == [False, False]


def test_table_has_every_row(script: dict[str, Any]) -> None:
    products = [
        {"path": "2:4 cutlass", "shape": [64, 64], "dtype": "fp32", "refused": "keeps one of two"},
        {"path": "32x32", "shape": [64, 64], "dtype": "fp16", "ok": False, "error": "RuntimeError('a|b')"},
        {"path": "32x32", "shape": [64, 64], "dtype": "fp16", "tokens": 1, "ok": True, "off": 1e-4, "gain": 2.0,
         "us": {"sparse": [1.0, 2.0, 3.0], "dense": [2.0, 4.0, 5.0]}},
    ]  # fmt: skip
    checks = [{"check": "one", "ok": None}, {"check": "two", "ok": False, "said": "a|b"}]
    text = script["table"]({"machine": {"torch": "2"}, "products": products, "checks": checks})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 2 + 2
    assert len({line.count("|") for line in lines[:5]}) == 1, "as many columns in each row"
