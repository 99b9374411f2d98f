"""One engine in a process of its own, for bench_peers.py: loads an ONNX file, then times a call on each request.

    python scripts/benchmarks/peer.py ENGINE MODEL.onnx INPUT.npy OUTPUT.npy THREADS

ENGINE is deepsparse, onnxruntime, onnxruntime-int8 or openvino. It computes once and writes the output. Then it
prints "ready" with its versions and, for every line on its standard input, the seconds of one call: wall-clock and CPU
time. Needs NumPy and the engine, nothing of hf_sparse or torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]


def deepsparse(path: str, ids: Any, threads: int) -> tuple[Run, str]:
    """Load into DeepSparse."""
    import deepsparse as engine

    loaded = engine.Engine(path, batch_size=len(ids), num_cores=threads)
    return lambda: loaded.run([ids])[0], f"DeepSparse {engine.__version__}"


def onnxruntime(path: str, ids: Any, threads: int) -> tuple[Run, str]:
    """Load into ONNX Runtime."""
    import onnxruntime as engine

    options = engine.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between calls would slow down whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = engine.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: ids}
    return lambda: session.run(None, feed)[0], f"ONNX Runtime {engine.__version__}"


def onnxruntime_int8(path: str, ids: Any, threads: int) -> tuple[Run, str]:
    """Quantize weights to int8, activations as they come, and load into ONNX Runtime.

    Without VNNI sums of two products saturate at 16 bits (vpmaddubsw): its documentation advises weights of 7 bits
    there.
    """
    from onnxruntime.quantization import quantize_dynamic

    file = str(Path(path).with_suffix(f".{os.getpid()}.int8.onnx"))
    narrow = has_no_vnni()
    quantize_dynamic(path, file, reduce_range=narrow)
    run, version = onnxruntime(file, ids, threads)
    return run, f"{version}, dynamic int8{' with weights of 7 bits' if narrow else ''}"


def has_no_vnni() -> bool:
    """Return whether this is an x86 processor without VNNI."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx2" in known and "vnni" not in known


def openvino(path: str, ids: Any, threads: int) -> tuple[Run, str]:
    """Load into OpenVINO, in float32."""
    import openvino as engine

    wanted = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = engine.Core()
    request = core.compile_model(core.read_model(path), "CPU", wanted).create_infer_request()

    def run() -> Any:
        return request.infer([ids])[0]

    return run, f"OpenVINO {engine.__version__.partition('-')[0]}"


ENGINES = {
    "deepsparse": deepsparse,
    "onnxruntime": onnxruntime,
    "onnxruntime-int8": onnxruntime_int8,
    "openvino": openvino,
}


def main() -> None:
    """Serve the caller until its pipe closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print banners
    name, path, given, wanted, threads = sys.argv[1:]
    ids = np.load(given)
    run, version = ENGINES[name](path, ids, int(threads))
    np.save(wanted, np.asarray(run()))
    answers.write(f"ready {version}\n")
    for _ in sys.stdin:
        start, busy = time.perf_counter(), time.process_time()
        run()
        answers.write(f"{time.perf_counter() - start} {time.process_time() - busy}\n")


if __name__ == "__main__":
    main()
