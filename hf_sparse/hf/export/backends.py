"""The runtimes that a model can be exported for, and what each of them needs."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from ...errors import BackendError, RecipeError


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime to export for: its classes in `transformers.exporters`, and what has to be installed.

    Args:
        exporter, config: names of classes.
        needs: packages that are imported.
        pip: what installs them.
        bounded: whether the largest batch and length are fixed at export, because memory is planned then.
        runner: options of its runner for the comparison.
        note: what whoever runs the file has to know.
    """

    exporter: str
    config: str
    needs: tuple[str, ...] = ()
    pip: str = ""
    bounded: bool = False
    runner: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


TARGETS = {
    "onnx": Target("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime"), '"hf_sparse[export]"'),
    "openvino": Target(
        "OpenVINOExporter",
        "OpenVINOConfig",
        ("openvino",),
        "openvino",
        # Requested, because on CPUs with bfloat16 products OpenVINO uses them by default, and differs by 1e-2.
        runner={"config": {"INFERENCE_PRECISION_HINT": "f32"}},
        note="compared with INFERENCE_PRECISION_HINT=f32; without it OpenVINO may compute in bfloat16",
    ),
    "executorch": Target("ExecutorchExporter", "ExecutorchConfig", ("executorch",), "executorch", bounded=True),
    "torch": Target("DynamoExporter", "DynamoConfig"),
}


def require(to: str) -> Target:
    """Return the target of that name. Its packages are looked for and not imported, some take seconds.

    Raises:
        RecipeError: if there is no such target.
        BackendError: if a package is missing.

    Example:
        >>> require("torch").exporter
        'DynamoExporter'
    """
    if to not in TARGETS:
        raise RecipeError(f"cannot export to '{to}'; known are {', '.join(TARGETS)}")
    target = TARGETS[to]
    if missing := [name for name in target.needs if importlib.util.find_spec(name) is None]:
        raise BackendError(f"export to {to} needs {', '.join(missing)}, not installed here: pip install {target.pip}")
    return target
