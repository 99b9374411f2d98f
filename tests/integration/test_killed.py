"""A run that is killed and resumed is the run that was not, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import ROOT, TORCHRUN

WORKER = "tests.integration.killed_worker"
SECONDS = 300


def start(
    output: Path, scorer: str, moment: str = "never", pair: bool = False, sharded: bool = False
) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, *([*TORCHRUN, "2"] if pair else []), "-m", WORKER, str(output), scorer, moment),
        *(["sharded"] if sharded else []),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors[-3000:]
    return output


def kill_at(process: subprocess.Popen[str], step: int) -> None:
    """Kill the whole family of processes as soon as it says that it has done this step."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= step:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL


def same(whole: Path, resumed: Path) -> None:
    first, second = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, resumed))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    zeros = sum(int((tensor == 0).sum()) for name, tensor in first.items() if "layer" in name and tensor.ndim == 2)
    assert zeros >= 0.9 * 2 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["movement", "soft_movement"])
def test_run_killed_at_any_step_and_resumed_is_the_uninterrupted_run(scorer: str, tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", scorer))
    step = random.SystemRandom().randrange(6, 36)  # another one in each run of the test
    kill_at(start(tmp_path / "killed", scorer), step)
    assert not (tmp_path / "killed" / "final.pt").exists()
    done = finish(start(tmp_path / "killed", scorer)).split()
    assert int(done[0]) in range(step - 5, step + 7), (step, done)  # it went on, and did not start anew
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["optimizer-20", "weights-20"])
def test_run_killed_while_it_saves_and_resumed_is_the_uninterrupted_run(moment: str, tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", "movement"))
    killed = start(tmp_path / "killed", "movement", moment)
    killed.communicate(timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-20").exists()  # half of it
    assert finish(start(tmp_path / "killed", "movement")).split()[0] == "16"
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_killed_and_resumed_are_the_uninterrupted_run(tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", "movement", pair=True))
    kill_at(start(tmp_path / "killed", "movement", pair=True), 23)
    finish(start(tmp_path / "killed", "movement", pair=True))
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_with_shards_killed_and_resumed_are_the_uninterrupted_run(tmp_path: Path) -> None:
    how: dict[str, Any] = {"pair": True, "sharded": True}
    finish(start(tmp_path / "whole", "movement", **how))
    step = random.SystemRandom().randrange(6, 36)
    for moment, first in ((f"step-{step}", (step - 1) // 5 * 5 + 1), ("shards-20", 16), ("optimizer_shards-20", 16)):
        output = tmp_path / moment
        killed = start(output, "movement", moment, **how)
        killed.communicate(timeout=SECONDS)
        assert killed.returncode != 0
        assert (output / f"checkpoint-{first + 4}").exists() == (not moment.startswith("step"))  # half of it
        assert finish(start(output, "movement", **how)).split()[0] == str(first), moment
        same(tmp_path / "whole", output)
