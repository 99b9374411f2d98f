"""Half a checkpoint is none: what `last_checkpoint` takes and what it passes over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf_sparse import CheckpointError, last_checkpoint
from tests.helpers.training import sparse_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    sparse_trainer(folder, save_strategy="steps", save_steps=5, max_steps=15).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_the_highest_step_is_the_last_not_the_highest_name(run: Path) -> None:
    assert last_checkpoint(run) == str(run / "checkpoint-15")  # "checkpoint-5" sorts behind it


@pytest.mark.parametrize(
    "lost", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
)
def test_a_checkpoint_that_lacks_a_file_is_passed_over(lost: str, run: Path) -> None:
    (run / "checkpoint-15" / lost).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-10")


@pytest.mark.parametrize("text", ["", '{"global_step": 15, "log_hi', "[]", '{"global_step": 10}'])
def test_a_state_that_was_cut_off_or_is_of_another_step_is_passed_over(text: str, run: Path) -> None:
    (run / "checkpoint-15" / "trainer_state.json").write_text(text)
    assert last_checkpoint(run) == str(run / "checkpoint-10")


def test_every_process_that_wrote_it_needs_its_random_state(run: Path) -> None:
    assert last_checkpoint(run, processes=2) == str(run / "checkpoint-15")  # of one, which two can go on from
    for state in run.glob("*/trainer_state.json"):
        data = json.loads(state.read_text())
        assert data["stateful_callbacks"]["hf_sparse"]["sparsity"]["processes"] == 1
        data["stateful_callbacks"]["hf_sparse"]["sparsity"]["processes"] = 2
        state.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"checkpoint-15 lacks rng_state_0\.pth"):
        last_checkpoint(run, processes=1)


def test_only_half_checkpoints_are_an_error_and_not_a_new_start(run: Path) -> None:
    for step in (5, 10, 15):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .* checkpoint-15 lacks optimizer\.pt, .*"):
        last_checkpoint(run)


def test_no_folder_and_no_checkpoint_are_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None
