"""A teacher in the Trainers of sentence-transformers and, for embeddings, in the Trainer of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_sparse import DistillationCallback, RecipeError, SparsityConfig, summarize
from hf_sparse.hf.embedding.pooling import Pooling
from tests.helpers.sentence import (
    EARLY,
    LATE,
    TEXTS,
    cross_encoder,
    cross_trainer,
    logged,
    options,
    sentence_trainer,
    sentence_transformer,
    taught,
)

DENSE = SparsityConfig(sparsity=0.0, schedule="constant")
EMBEDDING_LOSSES = ["embedding_cosine", "embedding_mse", "embedding_similarity"]


def moved(model: Any, size: float = 0.05) -> Any:
    """A teacher that is not the student."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_self_agrees_with_itself_until_it_is_pruned(name: str, tmp_path: Path) -> None:
    trainer = sentence_trainer(tmp_path, sentence_transformer(tmp_path), taught(losses={name: 1.0}), max_steps=10)
    trainer.train()
    found = logged(trainer, f"distillation_{name}")
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[-1] > 10 * max(found[0], 1e-7)
    assert summarize(trainer.model).sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_student_learns_what_only_the_teacher_knows(name: str, tmp_path: Path) -> None:
    student = sentence_transformer(tmp_path)
    teacher = moved(student)
    constant = SparsityConfig(sparsity=0.1, schedule="constant")
    callback = taught(constant, teacher, losses={name: 10.0})
    trainer = sentence_trainer(tmp_path, student, callback, max_steps=40, learning_rate=1e-3)
    trainer.train()
    found = logged(trainer, f"distillation_{name}")
    assert found[-1] < 0.5 * found[0]


def test_hidden_states_and_attention_maps_are_compared_too(tmp_path: Path) -> None:
    student = sentence_transformer(tmp_path)
    student[0].model.set_attn_implementation("eager")
    losses = {"embedding_cosine": 1.0, "hidden": 1.0, "attention": 1.0}
    callback = taught(DENSE, moved(student), losses=losses)
    trainer = sentence_trainer(tmp_path, student, callback, max_steps=2)
    trainer.train()
    for name in ("embedding_cosine", "hidden", "attention"):
        assert all(value > 0 for value in logged(trainer, f"distillation_{name}")), name


def test_loss_of_the_trainer_counts_with_its_weight(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    model = sentence_transformer(tmp_path)
    columns = {"a": TEXTS, "b": TEXTS[::-1], "score": [0.25] * len(TEXTS)}
    found = {}
    for weight in (1.0, 0.25):
        student = copy.deepcopy(model)
        callback = taught(DENSE, moved(model), task_weight=weight)
        trainer = sentence_trainer(
            tmp_path, student, callback, columns, CosineSimilarityLoss(student), max_steps=1,
        )  # fmt: skip
        trainer.train()
        found[weight] = logged(trainer, "loss")[0], logged(trainer, "distillation_embedding_cosine")[0]
    (whole, term), (quarter, same) = found[1.0], found[0.25]
    assert term == pytest.approx(same)
    assert (whole - 0.9 * term) * 0.25 == pytest.approx(quarter - 0.9 * term, abs=2e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradient_does_not_depend_on_how_a_batch_is_accumulated(accumulate: int, tmp_path: Path) -> None:
    student = sentence_transformer(tmp_path)
    start = copy.deepcopy(student)
    callback = taught(DENSE, moved(student))
    trainer = sentence_trainer(
        tmp_path, student, callback, max_steps=1, per_device_train_batch_size=8 // accumulate, optim="sgd",
        gradient_accumulation_steps=accumulate, learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    before = dict(start.named_parameters())
    step = [parameter - before[name] for name, parameter in student.named_parameters()]
    size = float(torch.stack([value.norm() for value in step]).norm())
    expected = _size_of_one_step(tmp_path, start)
    assert size == pytest.approx(expected, rel=1e-3)


def _size_of_one_step(folder: Path, start: Any) -> float:
    """What one SGD step with rate 1 moves the weights by, computed without any Trainer, on the same eight sentences."""
    from hf_sparse.distillation.losses import cosine_distance

    trainer = sentence_trainer(folder, copy.deepcopy(start), taught(DENSE), max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    features = trainer.collect_features(dict(batch))[0][0]
    student, teacher = copy.deepcopy(start).train(), moved(start).eval()
    with torch.no_grad():
        target = teacher(dict(features))["sentence_embedding"]
    (0.9 * cosine_distance(student(dict(features))["sentence_embedding"], target)).backward()
    return float(torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm())


def test_nothing_is_left_in_model_and_trainer(tmp_path: Path) -> None:
    trainer = sentence_trainer(tmp_path, sentence_transformer(tmp_path), taught(EARLY))
    trainer.train()
    inner = trainer.model[0].model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (trainer.model, inner))
    assert "forward" not in vars(inner)
    assert "compute_loss" not in vars(trainer)


def test_a_folder_can_be_the_teacher(tmp_path: Path) -> None:
    model = sentence_transformer(tmp_path)
    model.save_pretrained(str(tmp_path / "teacher"))
    trainer = sentence_trainer(tmp_path, model, taught(teacher=str(tmp_path / "teacher")), max_steps=10)
    trainer.train()
    assert logged(trainer, "distillation_embedding_cosine")[0] == pytest.approx(0.0, abs=1e-6)


def test_a_loss_that_runs_the_model_without_gradients_is_refused(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = sentence_transformer(tmp_path)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    columns = {"a": TEXTS, "b": TEXTS[::-1]}
    trainer = sentence_trainer(tmp_path, model, taught(task_weight=1.0), columns, loss)
    with pytest.raises(RecipeError, match="CachedMultipleNegativesRankingLoss runs the model without gradients"):
        trainer.train()


@pytest.mark.parametrize("labelled", [True, False])
def test_cross_encoder_learns_the_scores_of_its_teacher(labelled: bool, tmp_path: Path) -> None:
    student = cross_encoder(tmp_path)
    teacher = moved(student)
    callback = taught(SparsityConfig(sparsity=0.1, schedule="constant"), teacher, task_weight=0.1 if labelled else 0.0)
    trainer = cross_trainer(tmp_path, student, callback, labelled, max_steps=40, learning_rate=3e-3)
    trainer.train()
    found = logged(trainer, "distillation_kl")
    assert found[-1] < 0.5 * found[0]


def test_penalty_of_a_scorer_reaches_the_loss_of_a_sentence_transformer(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    from hf_sparse import SparsityCallback

    soft = {"name": "soft_movement", "learning_rate": 1e-2, "threshold": 0.1}
    config = SparsityConfig(sparsity=0.5, scorer=soft, schedule={"name": "linear", "begin": 0.0, "end": 0.5})
    model = sentence_transformer(tmp_path)
    columns = {"a": TEXTS, "b": TEXTS[::-1], "score": [0.5] * len(TEXTS)}
    trainer = sentence_trainer(tmp_path, model, SparsityCallback(config), columns, CosineSimilarityLoss(model))
    trainer.train()
    assert logged(trainer, "penalty")


def plain_trainer(folder: Path, source: Path, callback: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = Dataset.from_dict({"text": TEXTS}).map(lambda row: tokenizer(row["text"]), remove_columns="text")
    arguments = TrainingArguments(**options(folder, train_sampling_strategy="group_by_length"))
    return Trainer(
        AutoModel.from_pretrained(source, attn_implementation="eager"),
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[callback],
    )


@pytest.mark.parametrize(("pooling", "dense"), [("mean", False), ("cls", True), (("mean", "max"), False)])
def test_plain_trainer_pools_as_the_modules_beside_the_model_do(pooling: Any, dense: bool, tmp_path: Path) -> None:
    model = sentence_transformer(tmp_path, pooling, dense=dense)
    model.save_pretrained(str(tmp_path / "saved"))
    losses = {"embedding_cosine": 1.0, "hidden": 1.0}
    trainer = plain_trainer(tmp_path, tmp_path / "saved", taught(LATE, losses=losses))
    trainer.train()
    assert logged(trainer, "distillation_embedding_cosine")[0] == pytest.approx(0.0, abs=1e-6)
    body = AutoModel.from_pretrained(tmp_path / "saved")
    tokens = dict(model.preprocess(TEXTS[:3]))
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        found = Pooling.of(body)(body(**inputs), inputs)
        torch.testing.assert_close(found, model(tokens)["sentence_embedding"])


def test_plain_trainer_without_modules_takes_the_mean(tmp_path: Path) -> None:
    sentence_transformer(tmp_path)
    body = AutoModel.from_pretrained(tmp_path / "body")
    states, mask = torch.arange(12.0).reshape(1, 3, 4), torch.tensor([[1, 1, 0]])
    found = Pooling.of(body)({"last_hidden_state": states}, {"attention_mask": mask})
    assert found.tolist() == [[2.0, 3.0, 4.0, 5.0]]


def test_distillation_callback_teaches_a_sentence_transformer(tmp_path: Path) -> None:
    student = sentence_transformer(tmp_path)
    teaching = {"teacher": "elsewhere", "task_weight": 0.0}
    callback = DistillationCallback(teaching, teacher=moved(student))
    trainer = sentence_trainer(tmp_path, student, callback, max_steps=20, learning_rate=3e-3)
    trainer.train()
    found = logged(trainer, "distillation_embedding_cosine")
    assert found[-1] < found[0]


def test_a_missing_label_names_the_way_out(tmp_path: Path) -> None:
    sentence_transformer(tmp_path)
    trainer = plain_trainer(tmp_path, tmp_path / "body", taught(task_weight=0.1))
    with pytest.raises(RecipeError, match="set task_weight: 0"):
        trainer.train()
