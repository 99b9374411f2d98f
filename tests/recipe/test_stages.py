"""Several trainings in one go: each starts from the one before, and an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import RecipeError, summarize
from hf_sparse.cli.main import main
from hf_sparse.recipe.stages import load_stages
from tests.helpers import tiny

PRUNED = {
    "name": "pruned",
    "sparsity": {"pattern": "head+neuron", "sparsity": 0.5, "schedule": {"name": "cubic", "begin": 0.0, "end": 0.5}},
    "distillation": {"teacher": "self"},
}
FILLED = {"name": "filled", "compact": True, "model": {"fill": True}, "distillation": {"teacher": "dense"}}
STAGES: list[Any] = [{"name": "dense"}, PRUNED, FILLED]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    tiny.save_bert(tmp_path / "bert", head=True)
    tiny.write_sentences(tmp_path / "train.jsonl", slice(0, 18))
    tiny.write_sentences(tmp_path / "dev.jsonl", slice(18, None))

    def made(stages: Any) -> Path:
        training = {
            "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, "save_steps": 2, "output_dir": "out", "logging_steps": 1,
        }  # fmt: skip
        data = {"train": "train.jsonl", "validation": "dev.jsonl", "max_length": 12}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": "bert", "data": data, "training": training, "stages": stages}))
        return path

    return made


def weights(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_dense_pruned_compacted_and_filled_in_one_go(write: Any, capsys: Any) -> None:
    assert main(["train", str(write(STAGES)), "--output", "all"]) == 0
    for folder in ("all/dense", "all/pruned", "all"):
        assert Path(folder, "report.md").is_file()
    pruned = AutoModelForSequenceClassification.from_pretrained("all/pruned")
    assert summarize(pruned).sparsity == pytest.approx(0.5, abs=0.02)
    dense, filled = weights("all/dense"), weights("all")
    assert not torch.equal(dense["classifier.weight"], weights("bert")["classifier.weight"])
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert filled[name].shape[0] < dense[name].shape[0]
    assert filled[name].shape == weights("all/pruned_compact")[name].shape
    written = yaml.safe_load(Path("all/recipe.yaml").read_text())
    assert written["sparsity"] is None
    assert Path(written["distillation"]["teacher"]) == Path("all/dense")
    logged = json.loads(Path("all/trainer_state.json").read_text())["log_history"]
    assert logged[0]["distillation_kl"] > 0


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [(1, 3), (2, 0)])
def test_resume_goes_on_in_the_stage_that_was_interrupted(
    at: tuple[int, int], write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(STAGES)
    assert main(["train", str(path), "--output", "whole"]) == 0
    trained: list[int] = []
    original = Trainer.train
    plain = Trainer.training_step

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(len(trained))
        return original(self, *args, **kwargs)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (trained[-1], self.state.global_step) == at:
            raise KilledError
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        patch.setattr(Trainer, "training_step", step)
        with pytest.raises(KilledError):
            main(["train", str(path), "--output", "halves"])
    before = Path("halves/dense/report.md").stat().st_mtime_ns
    assert main(["train", str(path), "--output", "halves", "--resume"]) == 0
    assert Path("halves/dense/report.md").stat().st_mtime_ns == before
    whole, halves = weights("whole"), weights("halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_resume_refuses_a_stage_of_another_recipe(write: Any, capsys: Any) -> None:
    assert main(["train", str(write([{"name": "one"}, {"name": "two"}])), "--output", "out"]) == 0
    changed = [{"name": "one", "training": {"max_steps": 5}}, {"name": "two"}]
    assert main(["train", str(write(changed)), "--output", "out", "--resume"]) == 2
    assert "stage 'one' in out/one was run with another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([], "`stages` must be a list of partial recipes, got"),
        ({"name": "x"}, "`stages` must be a list of partial recipes, got"),
        ([{"naem": "x"}], "stage 'stage1': the stage has no key 'naem'; did you mean 'name'"),
        ([{"training": {"max_step": 1}}], "the training section has no key 'max_step'; did you mean 'max_steps'"),
        ([{"name": "a/b"}], "`name` must be the name of a folder, got 'a/b'"),
        ([{"name": "x"}, {"name": "x"}], "`name` must differ from those of earlier stages, got 'x' again"),
        ([{"compact": True}], "`compact` must be left out of the first stage"),
        ([{}, {"compact": "yes"}], "`compact` must be true or false, got 'yes'"),
        ([{}, {"model": {"name": "other"}}], "starts from the model of the one before"),
        ([{"training": {"output_dir": "x"}}], "`training.output_dir` must be left out of a stage"),
        ([{"distillation": {"teacher": "self"}}], "there is no student to be pruned"),
        ([{"name": "self"}], "`name` must not be 'self', which as a teacher is the model before pruning"),
        ([{"name": "a", "distillation": {"teacher": "b"}}, {"name": "b"}], "stage 'b' does not come before it"),
        ([{"name": "a", "distillation": {"teacher": "a"}}], "stage 'a' does not come before it"),
        ([{"name": "a"}, {"name": "a_compact", "compact": True}, {}], "goes into out/a_compact, and so does a stage"),
    ],
)
def test_stages_refuse(stages: Any, reason: str, write: Any) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_stages(write(stages))


@pytest.mark.parametrize("folder", [None, 5])
def test_output_that_is_no_folder_is_refused(folder: Any, write: Any) -> None:
    path = write(STAGES)
    path.write_text(path.read_text().replace("output_dir: out", f"output_dir: {json.dumps(folder)}"))
    with pytest.raises(RecipeError, match=r"`training\.output_dir` must be a string"):
        load_stages(path)
