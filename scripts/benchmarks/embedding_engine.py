"""One engine in a process of its own, for bench_embedding.py: loads a model, then times `encode` on each request.

    python scripts/benchmarks/embedding_engine.py ENGINE MODEL SENTENCES.json OUTPUT.npy EXPORTED THREADS BATCH

ENGINE is torch, ours, ours-int8, onnx, onnx-int8, openvino or openvino-int8. SENTENCES.json has "all", which are
embedded once into OUTPUT.npy unless that is there, and "timed", a list for each name. EXPORTED is the folder for what
ENGINE is exported to, read if it is there. It prints "ready" with the versions. Then it prints for each name on its
standard input the seconds of one `encode` of that list. All engines go through `SentenceTransformer.encode`, so
tokenization, sorting by length and pooling are in every time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION = 16
"""Sentences that OpenVINO's static int8 is calibrated on."""
WORTH = 0.9
"""Share of the parameters above which heads and neurons that are zero stay: few removed ones disturb blocks of rows."""


def onnx(model: str, int8: bool, folder: Path, threads: int) -> tuple[Any, str]:
    """Load into ONNX Runtime, exported by optimum; int8 with the configuration for this processor.

    It takes a thread for each core, on whatever cores the process is kept to, unless its session says otherwise.
    """
    import onnxruntime
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    capped = os.environ.get("HF_SPARSE_ISA") == "avx2"
    vnni = not capped and "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    config = "avx512_vnni" if vnni else "avx2"
    if not _files(folder, ".onnx", int8):
        export = {"provider": "CPUExecutionProvider", "export": True}
        loaded = SentenceTransformer(model, backend="onnx", device="cpu", model_kwargs=export)
        loaded.save_pretrained(str(folder))
        if int8:
            export_dynamic_quantized_onnx_model(loaded, config, str(folder))
    session: Any = onnxruntime.SessionOptions()
    session.intra_op_num_threads = threads
    options = {"provider": "CPUExecutionProvider", "session_options": session}
    options["file_name"] = _files(folder, ".onnx", int8)[0]
    loaded = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=options)
    return loaded, f"onnxruntime {onnxruntime.__version__}{f', {config}' if int8 else ''}, {_package()}"


def openvino(model: str, int8: bool, folder: Path, threads: int, sentences: list[str]) -> tuple[Any, str]:
    """Load into OpenVINO, exported by optimum-intel; int8 is calibrated on sentences that are not measured.

    sentence-transformers pads each of them to 384 tokens, so few are enough, and 300 take very long.
    """
    import openvino as engine
    from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

    config = {"INFERENCE_NUM_THREADS": str(threads)} | ({} if int8 else {"INFERENCE_PRECISION_HINT": "f32"})
    if not _files(folder, ".xml", int8):
        options: dict[str, Any] = {"export": True, "ov_config": config}
        loaded = SentenceTransformer(model, backend="openvino", device="cpu", model_kwargs=options)
        loaded.save_pretrained(str(folder))
        if int8:
            few = importlib.import_module("optimum.intel").OVQuantizationConfig(num_samples=CALIBRATION)
            data = Path(tempfile.mkdtemp())
            rows = "".join(json.dumps({"text": text}) + "\n" for text in sentences)
            (data / "train.jsonl").write_text(rows, encoding="utf-8")
            export_static_quantized_openvino_model(
                loaded, few, str(folder), dataset_name=str(data), dataset_config_name="default",
                dataset_split="train", column_name="text",
            )  # fmt: skip
    options = {"file_name": _files(folder, ".xml", int8)[0], "ov_config": config}
    loaded = SentenceTransformer(str(folder), backend="openvino", device="cpu", model_kwargs=options)
    return loaded, f"openvino {engine.__version__}{f', static int8 of {CALIBRATION}' if int8 else ''}, {_package()}"


def _files(folder: Path, end: str, int8: bool) -> list[str]:
    """Return the names of exported programs, relative to the folder."""
    found = [path for path in folder.rglob(f"*{end}") if ("qint8" in path.name or "quint8" in path.name) == int8]
    return [path.relative_to(folder).as_posix() for path in found]


def _package() -> str:
    import sentence_transformers

    return f"sentence-transformers {sentence_transformers.__version__}"


def torch_or_ours(engine: str, model: str) -> tuple[Any, str]:
    """Load into torch, and pack the weights for "ours"."""
    import torch
    from sentence_transformers import SentenceTransformer

    if engine == "torch":
        return SentenceTransformer(model, device="cpu"), f"torch {torch.__version__}"
    import hf_sparse

    loaded: Any = SentenceTransformer(model, device="cpu")
    before = loaded[0].model.num_parameters()
    hf_sparse.compact(loaded[0].model)
    if engine == "ours-int8" or loaded[0].model.num_parameters() > WORTH * before:
        loaded = SentenceTransformer(model, device="cpu")  # int8 has no dense layers
    try:
        print(hf_sparse.to_runtime(loaded, "cpu-int8" if engine == "ours-int8" else "auto"), file=sys.stderr)
    except hf_sparse.BackendError as error:
        if engine == "ours-int8":
            raise
        print(error, file=sys.stderr)  # nothing else is sparse: it is dense and smaller
    return loaded, f"hf_sparse {hf_sparse.__version__}, torch {torch.__version__}"


def main() -> None:
    """Load, embed everything once, then time what is requested."""
    engine, model, sentences, output, exported, threads, batch = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    given = json.loads(Path(sentences).read_text(encoding="utf-8"))
    int8 = engine.endswith("-int8")
    if engine.startswith("onnx"):
        loaded, version = onnx(model, int8, Path(exported), int(threads))
    elif engine.startswith("openvino"):
        loaded, version = openvino(model, int8, Path(exported), int(threads), given["calibration"])
    else:
        loaded, version = torch_or_ours(engine, model)

    def encode(texts: list[str]) -> Any:
        return loaded.encode(texts, batch_size=int(batch), show_progress_bar=False)

    if not Path(output).is_file():
        np.save(output, encode(given["all"]), allow_pickle=False)
    for texts in given["timed"].values():
        encode(texts)  # what is compiled or packed at the first call is not timed
    print(f"ready {version}", flush=True)
    for line in sys.stdin:
        texts = given["timed"][line.strip()]
        start = time.perf_counter()
        encode(texts)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
