"""Start-up time of a saved sparse model, each in a process of its own, and the memory of several that serve it.

    python scripts/benchmarks/bench_start.py MODEL --rounds 5 --workers 8

MODEL is a checkpoint. Measured is from the call that loads it, with everything imported, to the end of the first
forward pass: "dense" from_pretrained alone; "cold" and to_runtime with no cached times of this machine; "warm" with
them; "saved" load_runtime of what save_runtime wrote. The files are in the page cache. The memory of N processes that
are alive together is the sum of their proportional set sizes (Pss): what they share counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODES = ("dense", "cold", "warm", "saved")


def pss() -> float:
    """Return the proportional set size of this process in MB; NaN where the system does not say."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    return float(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1]) / 1e3  # type: ignore[index]


def child(mode: str, folder: str, threads: int, backend: str) -> None:
    """Load, run once, say how long that took, and on request how much memory it takes."""
    import torch

    import hf_sparse
    from hf_sparse.analysis.bench_inputs import make_inputs
    from hf_sparse.hf.auto import load_whole

    torch.set_num_threads(threads)
    empty = pss()
    start = time.perf_counter()
    if mode == "saved":
        model: Any = hf_sparse.load_runtime(folder)
    else:
        packed = {} if mode == "dense" else {"quantization_config": hf_sparse.SparseConfig(backend=backend)}
        options: dict[str, Any] = {"dtype": torch.float32, **packed}
        model = load_whole(folder, **options)
    with torch.inference_mode():
        model(**make_inputs(model, 1, 16))
    print(time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"before": empty, "with": pss()}), flush=True)


class Process:
    """A process that loads a model.

    Args:
        cache: folder with times of this machine.
    """

    def __init__(self, mode: str, options: argparse.Namespace, cache: Path) -> None:
        folder = options.runtime if mode == "saved" else options.model
        command = [sys.executable, __file__, str(folder), "--child", mode, "--threads", str(options.threads)]
        self.process = subprocess.Popen(
            [*command, "--backend", options.backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "HF_SPARSE_CACHE": str(cache)},
        )  # fmt: skip
        self.seconds = float(self._line())

    def memory(self) -> dict[str, float]:
        """Return its memory now."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self._line())
        return found

    def end(self) -> None:
        """End it."""
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("bench_start: a process ended before it had loaded the model")
        return line


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto", help="see hf_sparse.to_runtime (auto)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.model, options.threads, options.backend)
        return
    import torch

    import hf_sparse
    from hf_sparse.hf.auto import load_whole
    from hf_sparse.profiling.timer import in_rounds, quartiles

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.runtime, warm = Path(folder) / "runtime", Path(folder) / "warm"
        os.environ["HF_SPARSE_CACHE"] = str(warm)
        model = load_whole(options.model, dtype=torch.float32)
        print(hf_sparse.to_runtime(model, options.backend))
        hf_sparse.save_runtime(model, options.runtime)

        def start(mode: str) -> float:
            with tempfile.TemporaryDirectory() as empty:
                process = Process(mode, options, Path(empty) if mode == "cold" else warm)
            process.end()
            return process.seconds

        seconds = in_rounds({mode: lambda mode=mode: start(mode) for mode in MODES}, options.rounds, warmup=1)  # type: ignore[misc]
        rows: dict[str, Any] = {mode: {"seconds": quartiles(found)} for mode, found in seconds.items()}
        for mode in ("dense", "warm", "saved"):
            processes = [Process(mode, options, warm) for _ in range(options.workers)]
            memory = [process.memory() for process in processes]
            for process in processes:
                process.end()
            rows[mode]["MB"] = sum(each["with"] for each in memory)
    for mode, row in rows.items():
        low, middle, high = row["seconds"]
        size = f"  {row['MB']:8.0f} MB for {options.workers} processes" if "MB" in row else ""
        print(f"{mode:<6} {middle:7.3f} s [{low:.3f}, {high:.3f}]{size}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
