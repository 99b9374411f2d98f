"""`hf-sparse train --resume` continues the run that made a checkpoint, or says what differs; nothing is inherited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, Trainer
from transformers.utils.logging import is_progress_bar_enabled

from hf_sparse.cli.main import main
from tests.helpers import tiny

TRAINING: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 2,
    "logging_steps": 1,
}
PRUNED = {"sparsity": 0.5, "schedule": {"name": "cubic", "begin": 0.0, "end": 0.5}}


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.save_bert(folder / "bert", head=True)
    tiny.save_bert(folder / "teacher", head=True)
    tiny.write_sentences(folder / "train.jsonl", slice(0, 18))
    tiny.write_sentences(folder / "other.jsonl", slice(2, 18))
    tiny.write_sentences(folder / "dev.jsonl", slice(18, None))
    return folder


def recipe(place: Path, name: str, **sections: Any) -> str:
    data = {"train": "train.jsonl", "validation": "dev.jsonl", "max_length": 12}
    whole = {"model": "bert", "data": data, "training": TRAINING, "sparsity": PRUNED, **sections}
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    """A finished run, with checkpoints of steps 2 and 4."""
    assert main(["train", recipe(place, "first"), "--output", str(place / "first")]) == 0
    return place / "first"


@pytest.fixture
def output(first: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first, tmp_path / "out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    return state


def same(one: Path, other: Path) -> bool:
    found, expected = weights(one), weights(other)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    plain = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KilledError
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(KilledError):
            main(["train", *command])


@pytest.mark.parametrize(
    ("sections", "listed"),
    [
        ({"training": {**TRAINING, "learning_rate": 1e-2}}, "training.learning_rate: 0.001 -> 0.01"),
        ({"training": {**TRAINING, "per_device_train_batch_size": 2}}, "per_device_train_batch_size: 4 -> 2"),
        ({"training": {**TRAINING, "max_steps": 6}}, "training.max_steps: 4 -> 6"),
        ({"sparsity": {**PRUNED, "sparsity": 0.25}}, "sparsity.groups.0.sparsity: 0.5 -> 0.25"),
        ({"sparsity": {**PRUNED, "scorer": "movement"}}, "sparsity.groups.0.scorer.name: magnitude -> movement"),
        ({"sparsity": {**PRUNED, "pattern": "row"}}, "sparsity.groups.0.pattern.name: element -> row"),
        ({"sparsity": None}, "sparsity.groups.0.sparsity: 0.5 -> not set"),
        ({"distillation": {"teacher": "self"}}, "distillation.teacher: not set -> self"),
        ({"distillation": {"teacher": "teacher"}}, "distillation.teacher: not set -> weights "),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"freeze": ["*embeddings*"]}, "freeze: [] -> ['*embeddings*']"),
        (
            {"data": {"train": "other.jsonl", "validation": "dev.jsonl", "max_length": 12}},
            "data.train: 18 examples, content",
        ),
        ({"data": {"train": "train.jsonl", "validation": "dev.jsonl", "max_length": 10}}, "data.max_length: 12 -> 10"),
        ({"model": "teacher_with_other_weights"}, "model: BertForSequenceClassification, weights "),
    ],
)
def test_resume_of_another_run_is_an_error_that_lists_what_differs(
    sections: dict[str, Any], listed: str, place: Path, output: Path, capsys: Any
) -> None:
    if sections.get("model"):
        model = AutoModelForSequenceClassification.from_pretrained(place / "bert")
        torch.nn.init.ones_(model.classifier.bias)
        model.save_pretrained(place / sections["model"])
        tiny.save_tokenizer(place / sections["model"])
    before = (output / "model.safetensors").read_bytes(), (output / "recipe.yaml").read_bytes()
    assert main(["train", recipe(place, "second", **sections), "--output", str(output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert listed in error
    assert "checkpoint-4 was made by a run that differs from this one" in error
    assert before == ((output / "model.safetensors").read_bytes(), (output / "recipe.yaml").read_bytes())


def test_resume_does_not_depend_on_where_files_are_or_how_a_config_is_spelled(
    place: Path, output: Path, tmp_path: Path, first: Path
) -> None:
    for name in ("bert", "train.jsonl", "dev.jsonl"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copyfile
        copy(place / name, tmp_path / name)
    groups = {"groups": [{**PRUNED, "scorer": {"name": "magnitude"}}]}
    training = {**TRAINING, "logging_steps": 2, "save_total_limit": 3}
    moved = recipe(tmp_path, "moved", sparsity=groups, training=training)
    assert main(["train", moved, "--output", str(output), "--resume"]) == 0
    assert same(output, first)


def test_allowed_change_of_the_learning_rate_takes_effect_and_is_recorded(place: Path, output: Path) -> None:
    shutil.rmtree(output / "checkpoint-4")
    changed = recipe(place, "rate", training={**TRAINING, "learning_rate": 1e-2})
    assert main(["train", changed, "--output", str(output), "--resume", "--allow", "learning_rate"]) == 0
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = {log["step"]: log["learning_rate"] for log in history if "learning_rate" in log}
    assert rates[2] == pytest.approx(1e-3 * 3 / 4)  # of the first run: linear from 1e-3 at step 0 to 0 at step 4
    assert rates[3] == pytest.approx(1e-2 * 2 / 4)
    assert rates[4] == pytest.approx(1e-2 * 1 / 4)
    assert "| changed on resume | step 2: training.learning_rate: 0.001 -> 0.01 |" in (output / "report.md").read_text()
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["hf_sparse"]["run"]["facts"]["training.learning_rate"] == 1e-2


def test_allow_without_resume_or_of_an_unknown_key_is_refused(place: Path, output: Path, capsys: Any) -> None:
    path = recipe(place, "same")
    assert main(["train", path, "--output", str(output / "new"), "--allow", "learning_rate"]) == 2
    assert "allow is for a run that is resumed" in capsys.readouterr().err
    assert main(["train", path, "--output", str(output), "--resume", "--allow", "lerning_rate"]) == 2
    assert "'lerning_rate' is not a key of this run; did you mean 'learning_rate'?" in capsys.readouterr().err
    assert main(["train", path, "--output", str(output), "--resume", "--overwrite"]) == 2
    assert "resume and overwrite contradict each other" in capsys.readouterr().err


def test_new_run_in_a_used_folder_is_refused_and_loses_nothing(place: Path, output: Path, capsys: Any) -> None:
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert main(["train", recipe(place, "second", seed=1), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "has a model or checkpoints of another run (checkpoint-2, checkpoint-4, model.safetensors)" in error
    assert "--resume" in error
    assert "--overwrite" in error
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_run_that_overwrites_and_is_killed_early_resumes_as_itself(
    place: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = recipe(place, "second", seed=1)
    killed_at(1, monkeypatch, second, "--output", str(output), "--overwrite")  # before its first checkpoint
    assert not list(output.glob("*.safetensors"))
    assert not list(output.glob("checkpoint-*"))
    assert main(["train", second, "--output", str(output), "--resume"]) == 0
    assert main(["train", second, "--output", str(tmp_path / "whole")]) == 0
    assert same(output, tmp_path / "whole")
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] == pytest.approx(
        json.loads((tmp_path / "whole" / "eval_results.json").read_text())["eval_loss"]
    )


def test_model_without_checkpoints_is_not_resumed_from_nothing(place: Path, tmp_path: Path, capsys: Any) -> None:
    path = recipe(place, "no_checkpoints", training={**TRAINING, "save_strategy": "no"})
    assert main(["train", path, "--output", str(tmp_path / "out")]) == 0
    assert main(["train", path, "--output", str(tmp_path / "out"), "--resume"]) == 2
    assert "has a model (model.safetensors) and no checkpoint, so there is nothing to resume" in capsys.readouterr().err


def test_checkpoint_without_a_record_is_refused(place: Path, output: Path, capsys: Any) -> None:
    for step in (2, 4):
        path = output / f"checkpoint-{step}" / "trainer_state.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "stateful_callbacks": {}}))
    assert main(["train", recipe(place, "same"), "--output", str(output), "--resume"]) == 2
    assert "does not record what made it" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["recipe.yaml", "trainer_state.json"])
def test_stages_with_a_damaged_file_end_in_an_error_or_go_on(
    damage: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    path = recipe(place, "stages", sparsity=None, stages=[{"name": "one"}, {"name": "two", "sparsity": PRUNED}])
    output = tmp_path / "out"
    assert main(["train", path, "--output", str(output)]) == 0
    (output / "one" / damage).write_bytes(b"\xff{[: broken")
    code = main(["train", path, "--output", str(output), "--resume"])
    if damage == "recipe.yaml":  # nothing is decided by it
        assert code == 0
    else:
        assert code == 2
        assert "cannot read the training state" in capsys.readouterr().err


def test_stages_of_another_run_are_not_gone_on_with(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"name": "one"}, {"name": "two", "sparsity": PRUNED}]
    output = str(tmp_path / "out")
    assert main(["train", recipe(place, "a", sparsity=None, stages=stages), "--output", output]) == 0
    other = recipe(place, "b", sparsity=None, stages=stages, seed=1)
    assert main(["train", other, "--output", output]) == 2
    assert "has a model or checkpoints of another run" in capsys.readouterr().err
    assert main(["train", other, "--output", output, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "stage 'one'" in error
    assert "seed: 0 -> 1" in error
    killed_at(1, monkeypatch, other, "--output", output, "--overwrite")
    assert main(["train", other, "--output", output, "--resume"]) == 0
    assert main(["train", other, "--output", str(tmp_path / "whole")]) == 0
    assert same(tmp_path / "out", tmp_path / "whole")


def test_train_on_a_cpu_shows_one_progress_bar_and_no_warning(place: Path, tmp_path: Path, capfd: Any) -> None:
    training = {**TRAINING, "disable_tqdm": False}
    assert main(["train", recipe(place, "quiet", training=training), "--output", str(tmp_path / "out")]) == 0
    shown = capfd.readouterr().err
    assert "4/4" in shown  # the training itself
    for unwanted in ("Writing model shards", "Loading weights", "pin_memory", "Warning", "warn("):
        assert unwanted not in shown
    assert is_progress_bar_enabled()


def test_change_of_a_finished_run_is_refused(place: Path, output: Path, capsys: Any) -> None:
    changed = ["--set", "training.learning_rate=0.01", "--resume", "--allow", "learning_rate"]
    assert main(["train", recipe(place, "first"), "--output", str(output), *changed]) == 2
    assert "has done its last step, so a change would have no effect: training.learning_rate" in capsys.readouterr().err
    longer = ["--set", "training.max_steps=6", "--resume", "--allow", "max_steps"]
    assert main(["train", recipe(place, "first"), "--output", str(output), *longer]) == 0
