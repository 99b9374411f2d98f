"""Run a function of a test module on several processes under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds that the ranks may take: the slow tests on a slow machine take half of it."""

# Standalone: torchrun's own store finds a free port. (With --master-port 0 both ranks wait for a port 0 for ever.)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def on_ranks(module: str, function: str, folder: Path, count: int = 2) -> None:
    """Call `function(folder)` of the module on `count` ranks, and fail with what they wrote if one of them fails."""
    script = folder / "worker.py"
    script.write_text(
        f"import pathlib, sys\n"
        f"from {module} import {function}\n"
        f"from tests.helpers.ranks import leave\n"
        f"{function}(pathlib.Path(sys.argv[1]))\n"
        f"leave()\n"
    )
    command = [sys.executable, *TORCHRUN, str(count), str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too: they would go on without it
            raise
    assert process.returncode == 0, errors[-3000:]


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Make a group of this process alone, in which `fully_shard` and DTensor work."""
    store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def leave() -> None:
    """End this rank without the interpreter's own end.

    Gloo's threads may still hold what belongs to the interpreter, even after the group was taken down, and then abort
    it while it ends (https://github.com/pytorch/pytorch/pull/179291): once in twelve runs on a busy machine, whatever
    the rank had done before.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
