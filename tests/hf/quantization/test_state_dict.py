"""A Trainer reads packed checkpoints back: resuming and the best model, as with a dense model, zeros kept."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    trainer_utils,
)

import hf_sparse
from hf_sparse import CheckpointError, DistillationConfig, SparsityCallback, SparsityConfig, sparsify, summarize
from hf_sparse.hf.quantization.state_dict import read_state
from hf_sparse.hf.trainer.distillation_callback import DistillationCallback
from tests.helpers.training import Rows, arguments, bert

HALF = SparsityConfig(sparsity=0.5)
NAME = "bert.encoder.layer.0.attention.self.query.weight"


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": torch.tensor(index % 2)}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8))


def compacted() -> BertForSequenceClassification:
    model = sparsify(bert(), SparsityConfig(pattern="head", sparsity=0.5))
    hf_sparse.compact(model)
    return sparsify(model, SparsityConfig(sparsity=0.5))


MODELS = {"bert": (lambda: sparsify(bert(), HALF), Rows), "vit": (lambda: sparsify(vit(), HALF), Images),
          "compacted": (compacted, Rows)}  # fmt: skip


def same(found: Any, expected: Any) -> bool:
    states = found.state_dict(), expected.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[1][key], states[0][key]) for key in states[0]
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_of_a_finished_model_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    make, data = MODELS[kind]
    make().save_pretrained(tmp_path / "packed")
    cls = type(make())

    def trainer(folder: str) -> Any:
        model = cls.from_pretrained(tmp_path / "packed")
        options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return Trainer(model, arguments(tmp_path / folder, **options), train_dataset=data())

    whole = trainer("whole")
    whole.train()
    again = trainer("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(again.model, whole.model)
    zeros = [(name, weight == 0) for name, weight in cls.from_pretrained(tmp_path / "packed").named_parameters()]
    trained = dict(again.model.named_parameters())
    assert all(bool((trained[name][mask] == 0).all()) for name, mask in zeros if "bias" not in name)
    assert summarize(again.model).weights


@pytest.mark.parametrize(("kind", "distilled"), [*((kind, False) for kind in MODELS), ("bert", True)])
def test_the_best_model_is_that_of_its_checkpoint(kind: str, distilled: bool, tmp_path: Path) -> None:
    make, data = MODELS[kind]
    make().save_pretrained(tmp_path / "packed")
    model = type(make()).from_pretrained(tmp_path / "packed")
    trainer: Any = Trainer(
        model,
        arguments(
            tmp_path / "runs", max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.01,
        ),
        train_dataset=data(), eval_dataset=data(),
        callbacks=[DistillationCallback(DistillationConfig(), teacher=bert())] if distilled else None,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert same(trainer.model, type(model).from_pretrained(best))
    assert summarize(trainer.model).nonzeros == summarize(type(model).from_pretrained(tmp_path / "packed")).nonzeros


def test_a_sequence_to_sequence_trainer_resumes(tmp_path: Path) -> None:
    class Pairs(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[index], "labels": self.ids[index]}

    torch.manual_seed(0)
    config = T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50, decoder_start_token_id=0)  # type: ignore[call-arg]
    sparsify(T5ForConditionalGeneration(config), HALF).save_pretrained(tmp_path / "packed")
    results: list[Any] = []
    for resume in (None, str(tmp_path / "runs" / "checkpoint-2")):
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / "packed")
        options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "report_to": []}
        args = Seq2SeqTrainingArguments(str(tmp_path / "runs"), use_cpu=True, disable_tqdm=True, **options)
        trainer = Seq2SeqTrainer(model, args, train_dataset=Pairs())
        trainer.train(resume_from_checkpoint=resume)
        results.append(trainer.model)
    assert same(results[1], results[0])
    assert results[1].lm_head.weight is results[1].shared.weight


def test_a_model_in_training_whose_names_change_on_disk_resumes(tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.5, scorer="movement", schedule={"name": "cubic", "begin": 0.0, "end": 0.7})

    def trainer() -> Any:
        args = arguments(tmp_path / "runs", max_steps=6, save_strategy="steps", save_steps=3)
        return Trainer(vit(), args, train_dataset=Images(), callbacks=[SparsityCallback(config)])

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-3"))
    assert same(again.model, whole.model)
    assert summarize(again.model).sparsity == pytest.approx(0.5, abs=1e-2)


def test_shards_are_read_together(tmp_path: Path) -> None:
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    other = BertForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    trainer_utils.load_sharded_checkpoint(other, str(tmp_path))
    assert same(other, model)
    assert read_state(tmp_path, other).keys() == model.state_dict().keys()


# -- without a Trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", ["no", "deepcopy", "pickle"])
def test_a_packed_file_of_the_same_save_loads_into_any_copy(copied: str, tmp_path: Path) -> None:
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path)
    other: Any = BertForSequenceClassification.from_pretrained(tmp_path)
    if copied == "deepcopy":
        other = copy.deepcopy(other)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(other))  # noqa: S301  what was just written
    with torch.no_grad():
        other.get_parameter(NAME).zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(other, model)


def test_a_wrapped_model_unpacks_below_its_prefix(tmp_path: Path) -> None:
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path)
    wrapper = nn.ModuleDict({"module": BertForSequenceClassification.from_pretrained(tmp_path)})
    state = load_file(tmp_path / "model.safetensors")
    wrapper.load_state_dict({f"module.{key}": tensor for key, tensor in state.items()})
    assert same(wrapper["module"], model)


def test_a_dense_state_dict_loads_as_ever(tmp_path: Path) -> None:
    model, other = sparsify(bert(), HALF), sparsify(bert(), SparsityConfig(sparsity=0.9))
    other.load_state_dict(model.state_dict())
    assert same(other, model)


def test_a_file_of_another_save_is_refused_in_words(tmp_path: Path) -> None:
    sparsify(bert(), SparsityConfig(sparsity=0.9)).save_pretrained(tmp_path / "other")
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path / "own")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="packed in this state dict, by another save"):
        model.load_state_dict(load_file(tmp_path / "other" / "model.safetensors"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_damaged_checkpoint_is_refused_before_a_weight_changes(tmp_path: Path) -> None:
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[NAME][0] += 1
    with torch.no_grad():
        model.classifier.bias.add_(1)
    before = model.classifier.bias.detach().clone()
    with pytest.raises(CheckpointError, match="checksum"):
        model.load_state_dict(state)
    assert torch.equal(model.classifier.bias, before)


def test_resuming_with_a_dense_model_is_refused_in_words(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    Trainer(sparsify(bert(), HALF), args, train_dataset=Rows()).train()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(CheckpointError, match="holds a sparse model, and the model of this Trainer is dense"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_structure_is_refused_in_words(tmp_path: Path) -> None:
    compacted().save_pretrained(tmp_path / "compacted")
    model = sparsify(bert(), HALF)
    with pytest.raises(CheckpointError, match="have not lost the same heads and neurons"):
        read_state(tmp_path / "compacted", model)
