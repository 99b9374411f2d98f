"""The other engines of scripts/benchmarks/bench_peers.py: one process each, which answers when it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "peer.py"


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-int8"])
def test_peer_computes_says_ready_and_answers_every_line_with_seconds(engine: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    weight = np.arange(8, dtype=np.float32).reshape(4, 2) / 7
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["ids"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, (3, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 2))],
        [helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.flatten())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "ids.npy", ids)
    paths = [str(tmp_path / name) for name in ("model.onnx", "ids.npy", "out.npy")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), engine, *paths, "1"],
        input="go\ngo\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ready, *answers = done.stdout.splitlines()
    assert ready.startswith("ready ONNX Runtime")
    assert len(answers) == 2
    assert all(float(each) >= 0 for answer in answers for each in answer.split())
    far = 0.2 if engine.endswith("int8") else 1e-5
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ids @ weight, atol=far)
