"""Sparse models against other engines: DeepSparse, ONNX Runtime and OpenVINO, all in the same run.

    bash scripts/benchmarks/make_peers.sh peers                                   # their environments, once
    python scripts/benchmarks/bench_peers.py peers --quick --json peers.json      # BERT-base at 90 %, some minutes
    python scripts/benchmarks/bench_peers.py peers --threads 1 2 --json peers.json

Each engine runs in a process and an environment of its own, which loads an ONNX file of the same weights and reports
the seconds of one call on request; calls are interleaved, so that other load on the machine affects all. Outputs are
compared first, each with torch on the same weights. DeepSparse is given the pruned weights; ONNX Runtime and OpenVINO
use no zeros, and are given the dense ones. A speed-up is the median of the ratios within a round, with quartiles.
Pin the process to as many cores as threads (taskset), or engines may spread out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from avx2_code import keep_to_avx2  # type: ignore[import-not-found]  # beside this file
from bench_runtime import make, prune  # type: ignore[import-not-found]  # beside this file
from torch import Tensor, nn

from hf_sparse import to_runtime
from hf_sparse.analysis.benchmark import INT8_TOLERANCE
from hf_sparse.kernels import library_status
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import in_rounds, quartiles, ratios, threads_of_torch

BARS = {"element": 1.3, "4x1": 1.6}
"""How many times as fast as DeepSparse ours is asked to be at 90 %."""

TOLERANCE = 1e-3
"""Greatest difference of outputs in float32, relative to the greatest output."""

Seconds = tuple[float, float]
"""On the clock, and of the processor."""

Run = Callable[[], Seconds]


class Inputs(nn.Module):
    """A model as a function of its token ids alone, for the ONNX file."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return the hidden states."""
        hidden: Tensor = self.model(input_ids=ids, use_cache=False)[0]
        return hidden


@torch.inference_mode()
def answer(model: Any, ids: Tensor) -> Tensor:
    """Return what a model computes."""
    hidden: Tensor = model(ids)[0]
    return hidden.clone()


def export(model: Any, ids: Tensor, path: Path) -> None:
    """Write an ONNX file in the form that DeepSparse recognises best: traced, with attention spelt out."""
    model.set_attn_implementation("eager")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        torch.onnx.export(Inputs(model).eval(), (ids,), path, input_names=["ids"], dynamo=False, opset_version=14)
    model.set_attn_implementation("sdpa")


class Peer:
    """An engine in its own process; see peer.py.

    Args:
        folder: with the environments.
        engine: of peer.py.
        expected: the output of torch on the weights of the file.
    """

    def __init__(self, folder: Path, engine: str, file: Path, ids: Path, threads: int, expected: Tensor) -> None:
        python = folder / engine.partition("-")[0] / "bin" / "python"
        output = file.with_suffix(f".{engine}.npy")
        command = [str(python), str(Path(__file__).with_name("peer.py")), engine, str(file), str(ids), str(output)]
        quiet = {"OMP_NUM_THREADS": str(threads), "NM_DISABLE_ANALYTICS": "1", "DO_NOT_TRACK": "1"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | quiet
        with file.with_suffix(f".{engine}.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        line = self._read()
        if not line.startswith("ready "):
            raise SystemExit(f"{engine} did not start: {file.with_suffix(f'.{engine}.log').read_text()[-2000:]}")
        self.version = line.removeprefix("ready ").strip()
        found = torch.from_numpy(np.load(output))
        self.difference = float((found - expected).abs().max() / expected.abs().max())
        if not engine.endswith("int8") and not self.difference <= TOLERANCE:
            raise SystemExit(
                f"{engine} computes something else: its output is {self.difference:.1e} from that of torch"
            )

    def __call__(self) -> Seconds:
        """Let it compute once, and return what that took."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        wall, busy = self._read().split()
        return float(wall), float(busy)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def here(model: Any, ids: Tensor) -> Run:
    """Return what times a model in this process."""

    @torch.inference_mode()
    def run() -> Seconds:
        start, busy = time.perf_counter(), time.process_time()
        model(ids)
        return time.perf_counter() - start, time.process_time() - busy

    return run


def measure(options: argparse.Namespace, name: str, batch: int, threads: int, sparsity: float) -> dict[str, Any]:
    """Time everything at one sparsity."""
    ids = torch.randint(5, 1000, (batch, options.length), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Run] = {}
    differences: dict[str, float] = {}
    layers, versions = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        given = Path(folder) / "ids.npy"
        np.save(given, ids.numpy())

        def start(label: str, engine: str, file: Path, expected: Tensor) -> None:
            peer = Peer(options.peers, engine, file, given, threads, expected)
            stack.callback(peer.close)
            runs[label], differences[label], versions[label] = peer, peer.difference, peer.version

        dense = make(name)
        runs["dense"] = here(dense, ids)
        for pattern in options.patterns:
            model = make(name)
            prune(model, sparsity, pattern)
            expected = answer(model, ids)
            file = Path(folder) / f"{pattern}.onnx"
            if "deepsparse" in options.engines:
                export(model, ids, file)
                start(f"deepsparse {pattern}", "deepsparse", file, expected)
            wishes = {f"ours {pattern}": (options.backend, TOLERANCE)}
            if options.int8:
                wishes[f"ours int8 {pattern}"] = ("cpu-int8", INT8_TOLERANCE)
            for label, (backend, tolerance) in wishes.items():
                own = copy.deepcopy(model)
                report = to_runtime(own, backend)
                layers[pattern] = f"{len(report.sparse)}/{len(report.layers)}"
                differences[label] = float((answer(own, ids) - expected).abs().max() / expected.abs().max())
                if not differences[label] <= tolerance:
                    raise SystemExit(f"{label} is {differences[label]:.1e} from torch on the same weights")
                runs[label] = here(own, ids)
                if options.compile and backend == options.backend:
                    runs[f"ours compiled {pattern}"] = here(torch.compile(own), ids)
        others = [engine for engine in options.engines if engine != "deepsparse"]
        if others:
            file = Path(folder) / "dense.onnx"
            export(dense, ids, file)
            for engine in others:
                start(engine, engine, file, answer(dense, ids))
        taken = in_rounds(runs, options.rounds)
    place = 1 if options.clock == "cpu" or (options.clock == "auto" and threads == 1) else 0
    seconds = {run: [each[place] for each in found] for run, found in taken.items()}

    def ratio(slow: str, fast: str) -> tuple[float, float, float]:
        return quartiles(ratios(seconds, slow, fast))

    rivals = {
        f"{ours} over {rival}": ratio(full, ours)
        for pattern in options.patterns
        for ours in (f"ours {pattern}", f"ours int8 {pattern}")
        if ours in seconds
        for rival, full in [(f"deepsparse {pattern}",) * 2, *((other, other) for other in others)]
        if full in seconds
    }
    return {
        "model": name, "batch": batch, "length": options.length, "threads": threads, "sparsity": sparsity,
        "layers": layers, "versions": versions, "differences": differences,
        "seconds": {run: quartiles(found) for run, found in seconds.items()},
        "wall over cpu": {run: statistics.median(a / max(b, 1e-9) for a, b in found) for run, found in taken.items()},
        "speedup": {run: ratio("dense", run) for run in seconds if run != "dense"},
        "ahead": rivals,
    }  # fmt: skip


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Say what was measured, and where the bar is."""
    head = f"{row['model']}, {row['batch']} x {row['length']}, {row['threads']} thread(s), {row['sparsity']:.0%}"
    dense = row["seconds"]["dense"][1]
    yield f"{head}: dense {1e3 * dense:.1f} ms; layers packed {row['layers']}"
    for run, (low, middle, high) in row["speedup"].items():
        far = f"  {row['differences'][run]:.0e} off" if run in row["differences"] else ""
        each = 1e3 * row["seconds"][run][1]
        yield f"  {run:<22} {middle:5.2f}x [{low:.2f}, {high:.2f}] {each:8.1f} ms{far}"
    for pair, (low, middle, high) in row["ahead"].items():
        bar = (
            BARS.get(pair.split(" over ")[0].split()[-1], 1.0)
            if "deepsparse" in pair and row["sparsity"] == 0.9
            else 1.0
        )
        yield f"  {pair:<44} {middle:5.2f} [{low:.2f}, {high:.2f}]  {'holds' if middle >= bar else 'MISSED'} ({bar})"


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path, help="folder that make_peers.sh made")
    parser.add_argument("--models", nargs="+", default=["bert-base", "minilm-l6"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.8, 0.95, 0.5])
    parser.add_argument("--patterns", nargs="+", default=list(BARS), choices=list(BARS))
    engines = ["deepsparse", "onnxruntime", "onnxruntime-int8", "openvino"]
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backend", default="cpu", help="see hf_sparse.to_runtime (cpu)")
    parser.add_argument("--int8", action="store_true", help="ours in int8 too")
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile too")
    parser.add_argument(
        "--clock", choices=["auto", "wall", "cpu"], default="auto", help="auto: of the processor for one thread"
    )
    parser.add_argument("--quick", action="store_true", help="BERT-base at 90 %%, 7 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--avx2", action="store_true", help="keep to AVX2 what has a switch for it; see avx2_code.py")
    options = parser.parse_args()
    if options.avx2:
        keep_to_avx2()
    if options.quick:
        options.models, options.sparsities, options.rounds = ["bert-base"], [0.9], 7
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    setting = {
        "commit": commit,
        "machine": machine().rsplit(", ", 2)[0],
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": platform.platform(),
        "kernels": library_status().isa,
        "clock": options.clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg(),
    }  # fmt: skip
    print(setting)
    rows = []
    for threads in options.threads:
        with threads_of_torch(threads):
            for sparsity in options.sparsities:
                for name in options.models:
                    for batch in options.batches:
                        rows.append(measure(options, name, batch, threads, sparsity))
                        print("\n".join(lines(rows[-1])), flush=True)
                        if options.json is not None:
                            options.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
