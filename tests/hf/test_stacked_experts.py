"""Experts that are stacked in one tensor: pruned, saved, loaded and resumed like any weight; and GPT-2 beside them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from hf_sparse import SparsityCallback, SparsityConfig, fill, sparsify, summarize
from hf_sparse.modeling.layer_matching import match_weights
from tests.helpers import decoders, mixtures

EXPERTS = ["*.experts"]


def gpt_oss() -> Any:
    torch.manual_seed(0)
    sizes = {**decoders.SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).eval()


def build(name: str) -> Any:
    if name == "llama4":
        return mixtures.build(name)
    return gpt_oss() if name == "gpt-oss" else decoders.build(name)


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, decoders.VOCABULARY, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(name: str, folder: Path, config: dict[str, Any], resume: str | None = None) -> Any:
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    callbacks: list[Any] = [SparsityCallback(SparsityConfig(**config))]
    trainer = Trainer(build(name), arguments, train_dataset=Tokens(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def same(a: Any, b: Any) -> None:
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mixtral", {"targets": ["*.experts", "*_proj"], "pattern": "2:4"}),
        ("mixtral", {"targets": EXPERTS, "sparsity": 0.5, "scorer": "movement"}),
        ("gpt-oss", {"targets": EXPERTS, "pattern": "2:4"}),
        ("llama4", {"targets": EXPERTS, "pattern": "2:4"}),
        ("gpt2", {"pattern": "2:4"}),
        ("gpt2", {"sparsity": 0.5}),
    ],
)
def test_training_is_resumed_to_the_bit_and_the_model_loads(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    whole = train(name, tmp_path / "run", config)
    halfway = str(tmp_path / "run" / "checkpoint-3")
    same(train(name, tmp_path / "run", config, resume=halfway), whole)
    assert summarize(whole).sparsity == 0.5
    masked = type(whole).from_pretrained(halfway)  # of the masked model, without its training state
    assert 0 < summarize(masked).sparsity <= 0.5
    whole.save_pretrained(tmp_path / "final")
    loaded = type(whole).from_pretrained(tmp_path / "final")
    same(loaded, whole)
    assert set(loaded.hf_sparse_weights) == set(whole.hf_sparse_weights)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "llama4"])
def test_n_of_m_inputs_of_each_output_of_each_expert_stay(name: str) -> None:
    model = build(name)
    sparsify(model, SparsityConfig(targets=EXPERTS, pattern="2:4"))
    experts = mixtures.mixture(model, 1).experts
    for tensor in (experts.gate_up_proj, experts.down_proj):
        inputs_last = tensor.transpose(1, 2) if name in ("gpt-oss", "llama4") else tensor
        assert (inputs_last.reshape(-1, 4) != 0).sum(1).eq(2).all()


def test_zeros_of_experts_are_kept_in_training_until_they_are_filled() -> None:
    model = build("mixtral")
    sparsify(model, SparsityConfig(targets=EXPERTS, sparsity=0.5))
    experts: Any = model.model.layers[0].mlp.experts
    zeros = {key: tensor == 0 for key, tensor in experts.named_parameters()}
    ids = torch.arange(3, 30)[None]

    def step(trained: Any) -> Any:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
        return trained.model.layers[0].mlp.experts

    for trained in (copy.deepcopy(model), model):
        after = step(trained)
        for key, tensor in after.named_parameters():
            assert bool((tensor[zeros[key]] == 0).all()), key
            assert bool((tensor[~zeros[key]] != 0).all()), key
    after = step(fill(model))
    assert all(int((tensor == 0).sum()) == 0 for tensor in after.parameters())


def test_experts_are_named_once_where_they_are_no_target(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sparsify(build("mixtral"), SparsityConfig(sparsity=0.5))
    (message,) = [record.message for record in caplog.records if "stay dense" in record.message]
    assert "experts.gate_up_proj (parameter): 49.0%" in message
    assert "targets: ['*_proj', '*.experts']" in message


def test_targets_name_one_weight_of_a_module_or_all() -> None:
    model = build("mixtral")
    assert list(match_weights(model, ["*0.mlp.experts.down_proj"])) == ["model.layers.0.mlp.experts.down_proj"]
    assert len(match_weights(model, EXPERTS)) == len(match_weights(model, ["*.experts.*"])) == 4
    assert len(match_weights(model, EXPERTS, ["*down_proj"])) == 2
