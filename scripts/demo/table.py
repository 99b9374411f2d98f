"""Print the demo's table, dense and sparse, and fail if one of its promises does not hold.

    python scripts/demo/table.py DENSE_FOLDER SPARSE_FOLDER

Reads what `hf-sparse train` and `hf-sparse bench --save` wrote, and what check.py wrote in two processes of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse.formats.inspection import inspect
from hf_sparse.profiling.speed_record import SPEED, Speed, read_speed
from hf_sparse.recipe.recipe import Recipe

PROCESSES = ("first", "second")
SPARSITY_TOLERANCE = 1e-4
ACCURACY_TOLERANCE = 0.02
MOST_OF_DENSE = 0.15


@dataclasses.dataclass(frozen=True)
class Run:
    """The records of one finished run."""

    folder: Path
    trained: dict[str, Any]
    evaluated: dict[str, Any]
    checks: list[dict[str, Any]]
    logits: list[np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder."""

        def load(name: str) -> Any:
            return json.loads((folder / name).read_text(encoding="utf-8"))

        return cls(
            folder,
            load("train_results.json"),
            load("eval_results.json"),
            [load(f"check_{process}.json") for process in PROCESSES],
            [np.load(folder / f"check_{process}.npy", allow_pickle=False) for process in PROCESSES],
        )

    @property
    def accuracy(self) -> float:
        """On the validation examples, in the training process."""
        return float(self.evaluated["eval_accuracy"])

    @property
    def same_metrics(self) -> bool:
        """Whether loss and accuracy after reloading equal those of the training process exactly."""
        keys = ("eval_loss", "eval_accuracy")
        return all(check["metrics"][key] == self.evaluated[key] for check in self.checks for key in keys)

    @property
    def same_logits(self) -> bool:
        """Whether two processes that loaded the folder computed the same bits."""
        first, second = self.logits
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()

    @property
    def load_milliseconds(self) -> float:
        """The smaller of the medians of the two processes."""
        return 1e3 * min(check["load_seconds"] for check in self.checks)

    @property
    def file_bytes(self) -> int:
        """All weight files together."""
        return sum(inspect(self.folder).files.values())

    def sparsity(self, names: set[str]) -> float:
        """Fraction of zeros in these weights, counted in the loaded model."""
        counts = [self.checks[0]["zeros"][name] for name in names]
        return sum(count[0] for count in counts) / sum(count[1] for count in counts)

    def stored(self, names: set[str]) -> tuple[int, int]:
        """Bytes of these weights in the file, and as dense fp32."""
        tensors = [tensor for tensor in inspect(self.folder).tensors if tensor.name in names]
        return sum(tensor.stored_bytes for tensor in tensors), sum(4 * tensor.parameters for tensor in tensors)


def requested_sparsity(run: Run) -> float:
    """Return the sparsity that the recipe of a run requests; the demo's has one group."""
    config = Recipe.load(run.folder / "recipe.yaml").sparsity
    requested = {group.sparsity for group in config.groups} if config else set()
    if len(requested) != 1 or None in requested:
        sys.exit(f"{run.folder} has to be trained to one sparsity, got {sorted(map(str, requested))}")
    return float(requested.pop() or 0.0)


def megabytes(count: int) -> str:
    """Return a size in MB of a million bytes."""
    return f"{count / 1e6:.2f} MB"


def milliseconds(speed: Speed, sparse: bool) -> str:
    """Return the median time of a forward pass."""
    return f"{1e3 * (speed.sparse if sparse else speed.dense)[1]:.1f} ms"


def table(dense: Run, sparse: Run, names: set[str], speed: Speed) -> str:
    """Return the table."""
    lines_of: dict[str, Callable[[Run], str]] = {
        "accuracy, validation examples": lambda run: f"{run.accuracy:.4f}",
        "sparsity of the pruned weights": lambda run: f"{run.sparsity(names):.4%}",
        "model file": lambda run: megabytes(run.file_bytes),
        "pruned weights in it": lambda run: megabytes(run.stored(names)[0]),
        "pruned weights, fraction of dense fp32": lambda run: f"{run.stored(names)[0] / run.stored(names)[1]:.4f}",
        f"time per batch of {speed.batch} x {speed.length} tokens": lambda run: milliseconds(speed, run is sparse),
        "speed-up": lambda run: f"{speed.speedup[1]:.2f}" if run is sparse else "1.00",
        "load time": lambda run: f"{run.load_milliseconds:.0f} ms",
        "loss and accuracy after reloading": lambda run: "identical" if run.same_metrics else "DIFFERENT",
        "logits of two new processes": lambda run: "bit-identical" if run.same_logits else "DIFFERENT",
        "training time": lambda run: f"{run.trained['train_runtime']:.0f} s",
    }
    rows = [("", "dense", "sparse"), *((title, cell(dense), cell(sparse)) for title, cell in lines_of.items())]
    widths = [max(len(cells[column]) for cells in rows) for column in range(3)]
    lines = [f"| {a:<{widths[0]}} | {b:>{widths[1]}} | {c:>{widths[2]}} |" for a, b, c in rows]
    lines.insert(1, f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 1)}:|")
    return "\n".join(lines)


def broken_promises(dense: Run, sparse: Run, names: set[str]) -> list[str]:
    """Return a sentence for each promise that does not hold."""
    requested, found = requested_sparsity(sparse), sparse.sparsity(names)
    stored, full = sparse.stored(names)
    promises = {
        f"sparsity is {found:.4%}, requested {requested:.1%}": abs(found - requested) <= SPARSITY_TOLERANCE,
        f"accuracy dropped by more than {ACCURACY_TOLERANCE:.0%}": sparse.accuracy
        >= dense.accuracy - ACCURACY_TOLERANCE,
        f"the packed weights are {stored / full:.4f} of dense fp32, above {MOST_OF_DENSE}": stored
        <= MOST_OF_DENSE * full,
        "a reloaded model differs from the trained one": dense.same_metrics and sparse.same_metrics,
        "two processes computed different logits": dense.same_logits and sparse.same_logits,
    }
    return [sentence for sentence, kept in promises.items() if not kept]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    options = parser.parse_args()
    dense, sparse = Run.read(options.dense), Run.read(options.sparse)
    names = {tensor.name for tensor in inspect(sparse.folder).weights}
    print(table(dense, sparse, names, read_speed(options.sparse / SPEED)))
    broken = broken_promises(dense, sparse, names)
    if broken:
        sys.exit("BROKEN PROMISES: " + "; ".join(broken))


if __name__ == "__main__":
    main()
