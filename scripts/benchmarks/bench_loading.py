"""Memory of `from_pretrained` for a packed model against the dense one; bench_storage.py measures the time.

    python scripts/benchmarks/bench_loading.py                  # BERT-base at 90 %, fp32, five rounds: two minutes
    python scripts/benchmarks/bench_loading.py --layers 2 --rounds 1 # a first impression
    python scripts/benchmarks/bench_loading.py --backend cpu    # into runtime form too: SparseConfig(backend="cpu")

Each load runs in a process of its own, dense and packed interleaved, and ends with reading every weight once: files are
mapped into memory, so a dense model that nobody has used yet is not in memory at all. The peak is how far the resident
memory of the process rose above where it was before the load, as the kernel counts it (Linux). Before that, a tiny
model is loaded, so that what is imported on the way is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from hf_sparse import SparseConfig, SparsityConfig, sparsify
from hf_sparse.formats.manifest import Manifest
from hf_sparse.formats.safetensors_io import MANIFEST_KEY, read_header

TINY: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}


def memory(key: str) -> int:
    """Return a line of the kernel about this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def measure(folder: Path, tiny: Path, backend: str | None) -> None:
    """Load in this process, and print what it took as JSON."""
    torch.set_num_threads(1)
    wish: dict[str, Any] = {} if backend is None else {"quantization_config": SparseConfig(backend=backend)}
    transformers.BertModel.from_pretrained(tiny, **wish)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    model = transformers.BertModel.from_pretrained(folder, **wish)
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            parameter.view(-1)[::512].sum()  # a number of every page, without a copy
    print(json.dumps({"peak": memory("VmHWM") - before, "after": memory("VmRSS") - before}))


def packed_bytes(path: Path) -> int:
    """Return the bytes of a file that are decoded, and not used as they lie there."""
    metadata, stored = read_header(path)
    entries = Manifest.from_json(metadata[MANIFEST_KEY]).tensors
    dense = {key for key, entry in entries.items() if entry.codec == "dense"}
    return sum(tensor.nbytes for key, tensor in stored.items() if key not in dense)


def once(folder: Path, tiny: Path, backend: str | None = None) -> dict[str, float]:
    """Measure one load in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), str(tiny)]
    command += ["--backend", backend] if backend is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def quoted(values: list[float], digits: int = 1) -> str:
    """Return the median with the least and the greatest."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    """Make the models, load them interleaved, and print peaks and limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", help="load into runtime form too: auto, cpu or csr")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, tiny = options.measure
        measure(folder, tiny, options.backend)
        return
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SparsityConfig(sparsity=options.sparsity)
        sparsify(transformers.BertModel(transformers.BertConfig(**TINY)), config).save_pretrained(folder / "tiny")
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=options.layers))
        sparsify(model.to(getattr(torch, options.dtype)), config)
        model.save_pretrained(folder / "packed")
        model.save_pretrained(folder / "dense", format="dense")
        size = sum(parameter.nbytes for parameter in model.parameters())
        largest = max(parameter.nbytes for parameter in model.parameters())
        mapped = packed_bytes(folder / "packed" / "model.safetensors")
        del model
        found: dict[str, list[dict[str, float]]] = {"dense": [], "packed": []}
        found |= {"runtime": []} if options.backend is not None else {}
        for _ in range(options.rounds):
            for which, runs in found.items():
                form = folder / ("packed" if which == "runtime" else which)
                runs.append(once(form, folder / "tiny", options.backend if which == "runtime" else None))
    peaks = {which: [run["peak"] / 1e6 for run in runs] for which, runs in found.items()}
    print(f"model {size / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB, packed parts {mapped / 1e6:.1f} MB")
    for which, values in peaks.items():
        after = quoted([run["after"] / 1e6 for run in found[which]])
        share = statistics.median(values) * 1e6 / size
        print(f"peak of loading {which:>7}: {quoted(values)} MB, {share:.3f} x the model, afterwards {after} MB")
    differences = [packed - dense for packed, dense in zip(peaks["packed"], peaks["dense"], strict=True)]
    print(f"packed minus dense: {quoted(differences)} MB")
    limit = (size + largest + mapped) / 1e6
    print(f"limit, model + largest tensor + mapped parts: {limit:.1f} MB: ", end="")
    print("holds" if max(peaks["packed"]) <= limit else "DOES NOT HOLD")


if __name__ == "__main__":
    main()
