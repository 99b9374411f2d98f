"""SparsityCallback in Trainers of other libraries. (Teachers in those of sentence-transformers: tests/hf/embedding.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hf_sparse import SparsityCallback, SparsityConfig, SparsityError, summarize
from tests.helpers import tiny

CONFIG = SparsityConfig(sparsity=0.5, scorer="movement", schedule={"name": "linear", "begin": 0.0, "end": 0.5})
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def sft_trainer(folder: Path, **options: Any) -> Any:
    trl: Any = pytest.importorskip("trl", reason="SFTTrainer is of the package trl")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=384, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes))
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder / "run"), max_length=32, bf16=False, **OPTIONS),
        train_dataset=Dataset.from_dict({"text": ["the film is great", "the plot is dull and long"] * 8}),
        processing_class=ByT5Tokenizer(),
        callbacks=[SparsityCallback(CONFIG, **options)],
    )


def test_sft_trainer_prunes(tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path)
    trainer.train()
    assert summarize(trainer.model).sparsity == pytest.approx(0.5, abs=1e-3)
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, trainer.model.model.layers[0].mlp.up_proj.weight)


def test_sft_trainer_refuses_logits_of_a_teacher_before_step_one(tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path, teacher="self")
    with pytest.raises(SparsityError, match=r"no logits to distil.*SFTTrainer"):
        trainer.train()
    assert trainer.state.global_step == 0


def sentence_trainer(folder: Path, **options: Any) -> Any:
    st: Any = pytest.importorskip("sentence_transformers", reason="its trainer is of that package")
    models: Any = pytest.importorskip(
        "sentence_transformers.sentence_transformer.modules", reason="of an older version"
    )
    losses: Any = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="of an older version")
    body = models.Transformer(str(tiny.save_bert(folder / "bert")))
    model = st.SentenceTransformer(modules=[body, models.Pooling(32)], device="cpu")
    columns = {"a": ["the film is great", "the plot is dull"], "b": ["the film is fine", "the plot is poor"]}
    rows = {name: values * 8 for name, values in columns.items()}
    return st.SentenceTransformerTrainer(
        model,
        args=st.SentenceTransformerTrainingArguments(str(folder / "run"), **OPTIONS),
        train_dataset=Dataset.from_dict({**rows, "score": [0.9, 0.1] * 8}),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[SparsityCallback(CONFIG, **options)],
    )


def test_sentence_transformer_trainer_prunes(tmp_path: Path) -> None:
    trainer = sentence_trainer(tmp_path)
    trainer.train()
    assert summarize(trainer.model).sparsity == pytest.approx(0.5, abs=1e-3)
    before = trainer.model.encode(["the film is great"])
    trainer.model.save_pretrained(str(tmp_path / "out"))
    assert (type(trainer.model)(str(tmp_path / "out"), device="cpu").encode(["the film is great"]) == before).all()
