"""One-shot pruning from file to file in a process that is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hf_sparse

ROOT = Path(hf_sparse.__file__).parents[1]

PROGRAM = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import hf_sparse
    from {module} import {function}
    left = [{weights}]
    def on_layer(update):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    hf_sparse.sparsify_checkpoint({source!r}, {out!r}, {group!r}, {function}(), spill={spill}, on_layer=on_layer)
"""


def sparsify_killed(
    source: Path,
    out: Path,
    group: Mapping[str, Any],
    batches: Callable[[], Any],
    weights: int,
    spill: bool,
) -> None:
    """Run `sparsify_checkpoint` in a process that is killed when so many weights are pruned.

    Args:
        batches: a function of a module of the tests, which returns the batches.
    """
    program = PROGRAM.format(
        root=str(ROOT), module=batches.__module__, function=batches.__name__, weights=weights, source=str(source),
        out=str(out), group=dict(group), spill=spill,
    )  # fmt: skip
    alike = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # bits depend on the number of threads
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=alike)
    assert killed.returncode == -signal.SIGKILL
