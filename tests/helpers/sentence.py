"""Models and Trainers of sentence-transformers of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_sparse import SparsityCallback, SparsityConfig
from tests.helpers import tiny

EARLY = SparsityConfig(sparsity=0.5, schedule={"name": "linear", "begin": 0.0, "end": 0.5})
LATE = SparsityConfig(sparsity=0.5, schedule={"name": "linear", "begin": 0.7, "end": 0.9})
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXTS = [text for text, _ in tiny.sentences()]


def package() -> Any:
    """Return sentence-transformers; the test is skipped without it, or with one older than 6."""
    st: Any = pytest.importorskip("sentence_transformers", reason="models and Trainers are of that package")
    pytest.importorskip("sentence_transformers.base.model", reason="of an older sentence-transformers than 6")
    return st


def save_body(folder: Path, head: bool = False) -> Path:
    """Write a BERT without dropout, with or without a head for one number, and its tokenizer."""
    from transformers import BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    # Weights large enough that sentences differ.
    config = tiny.config(initializer_range=0.3, num_labels=1 if head else 2, **NO_DROPOUT)
    (BertForSequenceClassification(config) if head else BertModel(config)).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def sentence_transformer(folder: Path, pooling: Any = "mean", normalize: bool = True, dense: bool = False) -> Any:
    """Return a SentenceTransformer: BERT, pooling, and if asked for a dense layer and normalisation."""
    st = package()
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    body = Transformer(str(save_body(folder / "body")))
    modules: list[Any] = [body, Pooling(32, pooling)]
    size = modules[1].get_embedding_dimension()
    torch.manual_seed(1)
    modules += [Dense(size, 8)] if dense else []
    modules += [Normalize()] if normalize else []
    return st.SentenceTransformer(modules=modules, device="cpu")


def cross_encoder(folder: Path) -> Any:
    """Return a CrossEncoder that gives one score."""
    return package().CrossEncoder(str(save_body(folder / "cross", head=True)), device="cpu", num_labels=1)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return {**defaults, **more}


def sentence_trainer(
    folder: Path, model: Any, callback: Any, columns: Any = None, loss: Any = None, **more: Any
) -> Any:
    """Return a SentenceTransformerTrainer; without columns, on sentences without labels."""
    st = package()
    return st.SentenceTransformerTrainer(
        model,
        args=st.SentenceTransformerTrainingArguments(**options(folder, **more)),
        train_dataset=Dataset.from_dict(columns or {"text": TEXTS}),
        loss=loss,
        callbacks=[callback],
    )


def cross_trainer(folder: Path, model: Any, callback: Any, labelled: bool = True, **more: Any) -> Any:
    """Return a CrossEncoderTrainer on pairs, with scores or without."""
    st = package()
    columns: dict[str, Any] = {"a": TEXTS, "b": TEXTS[::-1]}
    if labelled:
        columns["label"] = [float(index % 2) for index in range(len(TEXTS))]
    return st.CrossEncoderTrainer(
        model,
        args=st.CrossEncoderTrainingArguments(**options(folder, **more)),
        train_dataset=Dataset.from_dict(columns),
        callbacks=[callback],
    )


def taught(config: SparsityConfig = LATE, teacher: Any = "self", **distillation: Any) -> SparsityCallback:
    """Return a callback that prunes and distils, without a task loss if none is given."""
    return SparsityCallback(config, teacher=teacher, distillation={"task_weight": 0.0, **distillation})


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]
