"""A loop of one's own around `Accelerator.prepare`, on two processes and on one, and under `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_sparse import Pruner, SparsityConfig, summarize
from tests.helpers.ranks import ROOT, on_ranks
from tests.helpers.training import RAMP, Rows, bert

STEPS, BATCH = 8, 16
CONFIG = SparsityConfig(sparsity=0.8, scorer={"name": "movement", "learning_rate": 1.0}, schedule=RAMP)


def own_loop(folder: Path) -> Any:
    """The loop that the README of accelerate shows, with a Pruner in it."""
    accelerator = Accelerator(cpu=True)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pruner = Pruner(model, CONFIG).attach()
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    data = torch.utils.data.DataLoader(Rows(STEPS * BATCH), BATCH // accelerator.num_processes)
    wrapped, optimizer, data = accelerator.prepare(model, optimizer, data)
    pruner.step(0.0)
    for step, batch in enumerate(data):
        accelerator.backward(wrapped(**batch).loss + pruner.penalty())
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / STEPS)
    pruner.finish()
    pruner.bake()
    assert summarize(model).sparsity == pytest.approx(0.8, abs=1e-3)
    if accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(wrapped).state_dict(), folder / f"own{accelerator.num_processes}.pt")
    return model


@pytest.mark.slow
def test_own_loop_on_two_processes_is_one_with_the_whole_batch(tmp_path: Path) -> None:
    on_ranks(__name__, "own_loop", tmp_path)
    own_loop(tmp_path)
    one, two = (torch.load(tmp_path / f"own{count}.pt", weights_only=True) for count in (1, 2))
    for name, expected in one.items():
        if name.endswith("weight") and "layer." in name and expected.ndim == 2:
            assert torch.equal(expected != 0, two[name] != 0), f"masks of {name}"
        torch.testing.assert_close(two[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_accelerate_launch_runs_the_same_loop(tmp_path: Path) -> None:
    # One process: on a CPU it starts several with MPI alone.
    script = tmp_path / "worker.py"
    script.write_text(f"import pathlib, sys\nfrom {__name__} import own_loop\nown_loop(pathlib.Path(sys.argv[1]))\n")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command = [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no", str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    launched = torch.load(tmp_path / "own1.pt", weights_only=True)
    (tmp_path / "own1.pt").unlink()
    own_loop(tmp_path)
    for name, expected in torch.load(tmp_path / "own1.pt", weights_only=True).items():
        assert torch.equal(launched[name], expected), name
