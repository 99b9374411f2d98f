"""Two processes under torchrun hold the same masks at every step."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_sparse import SparsityConfig, summarize

from ..training import RAMP, sparse_trainer

METHODS: dict[str, dict[str, Any]] = {
    "movement": {"scorer": "movement"},
    "soft": {"scorer": "soft_movement"},
    "taylor": {"scorer": "taylor"},
    "magnitude": {"scorer": "magnitude"},
    "neurons": {"scorer": "movement", "pattern": "neuron"},
    "neurons-taylor": {"scorer": "taylor", "pattern": "neuron"},
}


class Watch(TrainerCallback):
    """Note a hash of all masks after every step."""

    def __init__(self) -> None:
        self.hashes: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        masks = [module.mask for module in model.modules() if hasattr(module, "mask") and hasattr(module, "scores")]
        self.hashes.append(hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks)).hexdigest())


def worker(folder: Path) -> None:
    """What each rank runs: train with every method, and write down the hashes."""
    found = {}
    for name, method in METHODS.items():
        watch = Watch()
        config = SparsityConfig(sparsity=0.9, schedule=RAMP, **method)
        trainer = sparse_trainer(folder / name, config, callbacks=[watch], ddp_backend="gloo")
        trainer.train()
        found[name] = {"hashes": watch.hashes, "sparsity": summarize(trainer.model).sparsity}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_both_ranks_make_the_same_masks_at_every_step(tmp_path: Path) -> None:
    # Standalone: torchrun's own store finds a free port. (With --master-port 0 both ranks wait for a port 0 for ever.)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code = "import sys, pathlib; from tests.integration.test_ddp import worker; worker(pathlib.Path(sys.argv[1]))"
    script = tmp_path / "worker.py"
    script.write_text(code)
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*run, str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for name in METHODS:
        assert len(first[name]["hashes"]) == 20
        assert first[name]["hashes"] == second[name]["hashes"], name
        assert len(set(first[name]["hashes"])) > 3  # the masks do change on the way
        # A layer of 64 neurons keeps 6 of them.
        assert first[name]["sparsity"] == pytest.approx(1 - 6 / 64 if "neurons" in name else 0.9, abs=1e-3)
