"""Run a function of a test module on several processes under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
# Standalone: torchrun's own store finds a free port. (With --master-port 0 both ranks wait for a port 0 for ever.)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def on_ranks(module: str, function: str, folder: Path, count: int = 2) -> None:
    """Call `function(folder)` of the module on `count` ranks, and fail with what they wrote if one of them fails."""
    script = folder / "worker.py"
    script.write_text(
        f"import pathlib, sys\n"
        f"from {module} import {function}\n"
        f"from tests.integration.ranks import leave\n"
        f"{function}(pathlib.Path(sys.argv[1]))\n"
        f"leave()\n"
    )
    command = [sys.executable, *TORCHRUN, str(count), str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def leave() -> None:
    """Take the process group down before the interpreter ends: gloo's threads, still running then, can abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
