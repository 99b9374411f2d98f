"""Modules around a `PreTrainedModel`, trained, resumed and saved as SentenceTransformer and CrossEncoder do it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertModel, Trainer

from hf_sparse import CheckpointError, SparsityCallback, SparsityConfig, sparsify, summarize
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.model_state import sparse_weights
from tests.helpers import tiny
from tests.helpers.training import RAMP, Rows, arguments, sparse_trainer

STEPS: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
METHODS = ["magnitude", "movement", {"name": "taylor", "momentum": 0.5}]


class Encoder(nn.Module):
    """A backbone in a list of modules and a head, with a way of saving of its own."""

    def __init__(self, backbone: Any = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList([BertModel(tiny.config()) if backbone is None else backbone])
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        backbone: Any = self.parts[0]
        states = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.head(states.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def save(self, folder: Path) -> None:
        backbone: Any = self.parts[0]
        backbone.save_pretrained(folder / "backbone")
        safetensors.torch.save_file(self.head.state_dict(), folder / "head.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        model = cls(AutoModel.from_pretrained(folder / "backbone"))
        model.head.load_state_dict(safetensors.torch.load_file(folder / "head.safetensors"))
        return model


class EncoderTrainer(Trainer):
    """Saves and loads through the model's own files, which know weights alone."""

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        model.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.model is not None
        self.model.load_state_dict(Encoder.load(Path(resume_from_checkpoint)).state_dict())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def trainer(folder: Path, scorer: Any, kind: type[Trainer] = EncoderTrainer, **options: Any) -> Any:
    torch.manual_seed(0)
    callback = SparsityCallback(SparsityConfig(sparsity=0.75, scorer=scorer, schedule=RAMP))
    return kind(
        Encoder(), arguments(folder, **{**STEPS, **options}), train_dataset=Rows(), eval_dataset=Rows(16),
        callbacks=[callback],
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Trainer, EncoderTrainer])
@pytest.mark.parametrize("scorer", METHODS, ids=str)
def test_resumed_run_of_a_wrapper_is_the_uninterrupted_run(scorer: Any, kind: type[Trainer], tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", scorer, kind)
    whole.train()
    again = trainer(tmp_path / "again", scorer, kind)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_best_model_of_a_wrapper_is_whole_and_sparse(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    run = trainer(tmp_path, "magnitude", metric_for_best_model="loss", greater_is_better=True, **options)
    run.train()
    best = Encoder.load(Path(run.state.best_model_checkpoint)).state_dict()
    assert all(torch.equal(best[name], tensor) for name, tensor in run.model.state_dict().items())
    assert summarize(run.model).sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_backbone_of_a_wrapper_is_saved_packed_and_keeps_its_zeros(trained: bool, tmp_path: Path) -> None:
    if trained:
        run = trainer(tmp_path / "run", "magnitude")
        run.train()
        run.save_model(str(tmp_path / "out"))
        model = run.model
    else:
        model = sparsify(Encoder(), SparsityConfig(sparsity=0.75))
        model.save(tmp_path / "out")
    assert inspect(tmp_path / "out" / "backbone").packed
    loaded = Encoder.load(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert sorted(sparse_weights(loaded)) == sorted(sparse_weights(model))
    zeros = loaded.parts[0].encoder.layer[0].output.dense.weight == 0  # type: ignore[union-attr, index]
    Trainer(loaded, arguments(tmp_path / "more", max_steps=3), train_dataset=Rows()).train()
    assert not bool(loaded.parts[0].encoder.layer[0].output.dense.weight[zeros].any())  # type: ignore[union-attr, index]
    assert summarize(loaded).sparsity == pytest.approx(0.75, abs=1e-3)


def test_training_state_that_is_damaged_or_of_other_masks_is_a_checkpoint_error(tmp_path: Path) -> None:
    trainer(tmp_path, "magnitude").train()
    path = tmp_path / "checkpoint-4" / "sparsity_state.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(dict(list(state.items())[6:]), path)
    with pytest.raises(CheckpointError, match="is of other masks than those on the model"):
        trainer(tmp_path / "again", "magnitude").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot read the training state"):
        trainer(tmp_path / "again", "magnitude").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_model_of_transformers_has_its_training_state_in_its_own_file(tmp_path: Path) -> None:
    sparse_trainer(tmp_path, **STEPS).train()
    assert not (tmp_path / "checkpoint-4" / "sparsity_state.safetensors").exists()
