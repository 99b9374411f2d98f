"""Other engines that run a dense model on a CPU: the baseline of a benchmark is the fastest one of the run.

Each gets its number of threads: on cores that it is kept to, ONNX Runtime would still start one for each core.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import BackendError, RecipeError
from ..hf.export.exporter import export_model
from ..profiling.speed_record import FP32

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Engine = Callable[[Batch], Tensor]
"""A batch -> the first output of the model, or its logits."""

INT8 = "int8"


class Job(NamedTuple):
    """What an engine is made for.

    Args:
        model: dense, in float32, in eval mode.
        lengths: how many lengths the batches have.
        threads: that it may use.
        folder: for files of this engine, of every run of the process the same.
    """

    model: PreTrainedModel
    lengths: int
    threads: int
    folder: Path


@dataclass(frozen=True)
class DenseEngine:
    """An engine.

    Args:
        precision: "float32" or "int8".
        needs: packages that are imported; the first has the version.
        build: makes it.
    """

    precision: str
    needs: tuple[str, ...]
    build: Callable[[Job], Engine]

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    @property
    def version(self) -> str:
        """Name and version of the package."""
        return f"{self.needs[0]} {importlib.metadata.version(self.needs[0])}"


def _compiled(job: Job) -> Engine:
    compiled = torch.compile(job.model, dynamic=job.lengths > 1)

    def run(batch: Batch) -> Tensor:
        return first_output(compiled(**batch))

    return run


def _onnx_file(job: Job) -> Path:
    path = job.folder / "onnx"
    if not path.is_dir():
        export_model(job.model, "onnx", path)
    return next(path.glob("*.onnx"))


def _onnxruntime(job: Job) -> Engine:
    return _session(_onnx_file(job), job.threads)


def _onnxruntime_int8(job: Job) -> Engine:
    from onnxruntime.quantization import quantize_dynamic

    path = job.folder / "int8.onnx"
    if not path.is_file():
        quantize_dynamic(_onnx_file(job), path)
    return _session(path, job.threads)


def _session(path: Path, threads: int) -> Engine:
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its threads wait for the next call by spinning: on the cores of whatever is timed after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    output = _output_of([each.name for each in session.get_outputs()])

    def run(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run([output], _arrays(batch, names))[0])

    return run


def _openvino(job: Job) -> Engine:
    import openvino

    path = job.folder / "openvino"
    if not path.is_dir():
        export_model(job.model, "openvino", path)
    config = {"INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled: Any = openvino.Core().compile_model(str(next(path.glob("*.xml"))), "CPU", config)
    names = [each.get_any_name() for each in compiled.inputs]
    outputs = [each.get_any_name() for each in compiled.outputs]
    place = outputs.index(_output_of(outputs))
    request = compiled.create_infer_request()

    def run(batch: Batch) -> Tensor:
        return torch.from_numpy(request.infer(_arrays(batch, names))[place])

    return run


def _arrays(batch: Batch, names: Sequence[str]) -> dict[str, Any]:
    given = {name: tensor.numpy() for name, tensor in batch.items()}
    if "token_type_ids" in names:  # torch takes zeros where there are none
        given.setdefault("token_type_ids", np.zeros_like(given["input_ids"]))
    return {name: given[name] for name in names}


def _output_of(names: Sequence[str]) -> str:
    return "logits" if "logits" in names else names[0]


def first_output(outputs: Any) -> Tensor:
    """Return the logits of a model, or its first output."""
    found: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return found


ENGINES: dict[str, DenseEngine] = {
    "torch-compile": DenseEngine(FP32, ("torch",), _compiled),
    "onnxruntime": DenseEngine(FP32, ("onnxruntime", "onnx", "onnxscript"), _onnxruntime),
    "openvino": DenseEngine(FP32, ("openvino",), _openvino),
    "onnxruntime-int8": DenseEngine(INT8, ("onnxruntime", "onnx", "onnxscript"), _onnxruntime_int8),
}
"""By name, beside torch as it is."""


def engines_named(text: str) -> list[str]:
    """Return the names in a list with commas; "installed" and "none" stand for those that are installed, and no one.

    Raises:
        RecipeError: for an unknown name.
        BackendError: for one that is not installed.

    Example:
        >>> engines_named("none"), engines_named("torch-compile")
        ([], ['torch-compile'])
    """
    if text in ("none", "installed"):
        return [name for name, engine in ENGINES.items() if text == "installed" and not engine.missing]
    names = text.split(",")
    for name in names:
        if name not in ENGINES:
            raise RecipeError(f"`engines` must be installed, none, or some of {', '.join(ENGINES)}; got {name!r:.80}")
        if missing := ENGINES[name].missing:
            raise BackendError(f"the engine {name} needs {', '.join(missing)}, not installed here")
    return list(dict.fromkeys(names))


def built(
    names: Sequence[str],
    job: Job,
    difference: Callable[[str, Engine], float],
) -> tuple[dict[str, tuple[Engine, float]], dict[str, str]]:
    """Return engines that give the outputs of the model, each with its difference, and why others do not.

    Args:
        difference: (precision, engine) -> difference of its outputs; raises `BackendError` where it is above what the
            precision explains.
    """
    found: dict[str, tuple[Engine, float]] = {}
    left_out: dict[str, str] = {}
    for name in tqdm(names, desc="dense engines", disable=not names):
        engine = ENGINES[name]
        try:
            run = engine.build(job)
            found[name] = run, difference(engine.precision, run)
        except Exception as error:  # noqa: BLE001  whatever an engine cannot do with a model, the others are timed
            lines = str(error).strip().splitlines() or ["no reason given"]
            left_out[name] = f"{type(error).__name__}: {lines[0]:.200}"
            logger.warning(f"the dense engine {name} is left out: {left_out[name]}")
    return found, left_out
