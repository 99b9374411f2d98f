"""Sparse transfer end to end: pruned on one task, fine-tuned on another from plain dense files, with the same zeros.

With the MiniLM and the GLUE data of the recipes where their paths say (`models/`, `data/` in the root of the project),
from SST-2 to RTE; and everywhere with a model of a few thousand weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import SparsityConfig, keep_zeros, last_checkpoint, sparsify
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from tests.helpers.ranks import ROOT, on_ranks
from tests.helpers.training import Rows, arguments, bert

MODEL = ROOT / "models" / "paraphrase-minilm-l3-v2"
DATA = {task: ROOT / "data" / task for task in ("sst2", "rte")}


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    named = model.named_parameters()
    return {name: p.detach() == 0 for name, p in named if ".layer." in name and p.ndim > 1}


def assert_same_zeros(folder: Path, before: dict[str, torch.Tensor]) -> None:
    found = zeros(folder)
    assert found.keys() == before.keys()
    for name, gone in before.items():
        assert torch.equal(found[name], gone), name


# -- a few thousand weights, on two processes --------------------------------------------------------------------------


def worker(folder: Path) -> None:
    """What each rank runs: train further, be interrupted, resume."""
    model = keep_zeros(AutoModelForSequenceClassification.from_pretrained(folder / "upstream"))
    settings: dict[str, Any] = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    Trainer(model=model, args=arguments(folder / "run", **settings), train_dataset=Rows()).train()
    model = keep_zeros(AutoModelForSequenceClassification.from_pretrained(folder / "upstream"))
    again = Trainer(model=model, args=arguments(folder / "run", **{**settings, "max_steps": 15}), train_dataset=Rows())
    checkpoint = last_checkpoint(folder / "run", 2)
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-10")
    again.train(resume_from_checkpoint=checkpoint)
    again.save_model(str(folder / "out"))
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items() if "layer.0.output.dense" in name}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(state))


@pytest.mark.slow
def test_two_processes_keep_the_zeros_of_plain_dense_files_over_a_resume(tmp_path: Path) -> None:
    sparsify(bert(), SparsityConfig(sparsity=0.8)).save_pretrained(tmp_path / "upstream", format="dense")
    before = zeros(tmp_path / "upstream")
    on_ranks("tests.integration.test_sparse_transfer", "worker", tmp_path)
    assert_same_zeros(tmp_path / "out", before)
    assert (tmp_path / "rank0.json").read_text() == (tmp_path / "rank1.json").read_text()


# -- MiniLM from SST-2 to RTE ------------------------------------------------------------------------------------------


def recipe(task: str, start: Path, output: Path, **changes: Any) -> Recipe:
    text = {"sst2": "sentence", "rte": ["sentence1", "sentence2"]}[task]
    data = {"train": str(DATA[task] / "train.jsonl"), "validation": str(DATA[task] / "validation.jsonl"), "text": text}
    training = {
        "output_dir": str(output), "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-4,
        "save_strategy": "steps", "save_steps": 6, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return Recipe.from_dict(
        {
            "model": {"name": str(start), **changes.pop("model", {})},
            "data": {**data, "max_length": 48, "train_samples": 400, "validation_samples": 32},
            "freeze": ["*embeddings*"],
            "training": {**training, **changes.pop("training", {})},
            **changes,
        }
    )


def upstream(folder: Path) -> Path:
    """Prune on SST-2, and write what other programs have: dense files with zeros."""
    sparsity = {"sparsity": 0.8, "schedule": {"name": "cubic", "begin": 0.1, "end": 0.6}}
    run(recipe("sst2", MODEL, folder / "sst2", sparsity=sparsity, training={"save_strategy": "no"}))
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "sst2")
    model.save_pretrained(folder / "upstream", format="dense")
    run_tokenizer(folder / "sst2", folder / "upstream")
    return folder / "upstream"


def run_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def transfer(start: Path, output: Path, **changes: Any) -> Recipe:
    return recipe("rte", start, output, model={"keep_zeros": True}, **changes)


def transfer_on_ranks(folder: Path) -> None:
    """What each rank runs."""
    run(transfer(folder / "upstream", folder / "ddp", training={"ddp_backend": "gloo", "max_steps": 6}))


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir() or not DATA["rte"].is_dir(), reason=f"needs {MODEL} and {DATA['rte']}")
def test_rte_from_a_model_pruned_on_sst2_with_resume_and_two_processes(tmp_path: Path) -> None:
    start = upstream(tmp_path)
    before = zeros(start)
    assert sum(int(gone.sum()) for gone in before.values()) / sum(gone.numel() for gone in before.values()) > 0.79
    run(transfer(start, tmp_path / "whole"))
    assert_same_zeros(tmp_path / "whole", before)
    run(transfer(start, tmp_path / "half"))
    for path in (tmp_path / "half").iterdir():  # as after a kill behind step 6
        if path.name == "checkpoint-12":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        elif path.name != "checkpoint-6" and path.is_file():
            path.unlink()
    run(transfer(start, tmp_path / "half"), resume=True)
    assert_same_zeros(tmp_path / "half", before)
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    on_ranks("tests.integration.test_sparse_transfer", "transfer_on_ranks", tmp_path)
    assert_same_zeros(tmp_path / "ddp", before)
