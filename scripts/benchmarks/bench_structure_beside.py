"""What `bench_structure.py` measures beside: torch-pruning with the same survivors, the dense model in ONNX Runtime."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sparse.formats.structure import Edits
from hf_sparse.hf.export.exporter import export_model
from hf_sparse.modeling.architectures import find_sub_blocks


def missing() -> list[str]:
    """Return a line for each package that is not there, with how to get it."""
    return [
        f"{package} is not installed, so it is not measured: pip install {package}"
        for package in ("torch-pruning", "onnxruntime")
        if importlib.util.find_spec(package.replace("-", "_")) is None
    ]


def torch_pruned(dense: Any, edits: Edits) -> Any | None:
    """Cut the same heads and neurons with torch-pruning's functions for linear layers; None if it is not installed.

    The groups are given to it, not found by its dependency graph, so that the survivors are the same.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        return None
    import torch_pruning

    model = copy.deepcopy(dense)
    cuts = {name: cut for _, name, cut in edits}
    for block in find_sub_blocks(model, "the comparison"):
        cut = cuts[block.name]
        lost = sorted(set(range(cut.before)) - set(cut.kept))
        lines = [group * block.size + line for group in lost for line in range(block.size)]
        for layer in block.inputs.values():
            torch_pruning.prune_linear_out_channels(layer, lines)
        torch_pruning.prune_linear_in_channels(block.output, lines)
    return model


def onnx_run(dense: Any, ids: Tensor, threads: int) -> Callable[[], Any] | None:
    """Return a call of the dense model, fp32, under ONNX Runtime; None if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(dense, "onnx", folder, batch=2, length=ids.shape[1])
        name = next(name for name in report.files if name.endswith(".onnx"))
        session = onnxruntime.InferenceSession(f"{folder}/{name}", options, providers=["CPUExecutionProvider"])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    feed = {given.name: values[given.name].numpy() for given in session.get_inputs()}
    return lambda: session.run(None, feed)
