"""Default targets are the linear layers inside the blocks and nothing else; globs that match nothing say what could."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse import PatternError, Pruner, RecipeError, SparsityConfig
from hf_sparse.modeling.layer_matching import block_layers, match_layers, prunable_layers
from tests.helpers import tiny
from tests.helpers.training import bert

T5: dict[str, Any] = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 50}


def kinds(layers: dict[str, Any]) -> set[str]:
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in layers}


def test_default_targets_of_bert() -> None:
    assert kinds(block_layers(bert())) == {
        f"bert.encoder.layer.{rest}"
        for rest in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense",
        )
    }  # fmt: skip
    everything = prunable_layers(bert())
    assert {"bert.pooler.dense", "classifier"} <= set(everything)  # there, but only on request


def test_default_targets_of_t5_and_its_gated_kind() -> None:
    plain = kinds(block_layers(T5ForConditionalGeneration(T5Config(**T5))))
    attention = {f"encoder.block.layer.SelfAttention.{p}" for p in "qkvo"}
    assert attention | {"encoder.block.layer.DenseReluDense.wi", "encoder.block.layer.DenseReluDense.wo"} <= plain
    assert {f"decoder.block.layer.EncDecAttention.{p}" for p in "qkvo"} <= plain
    assert not any("lm_head" in name or "bias" in name or "shared" in name for name in plain)
    gated = kinds(block_layers(T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu"))))
    assert {f"encoder.block.layer.DenseReluDense.{w}" for w in ("wi_0", "wi_1", "wo")} <= gated


def test_default_targets_of_distilbert() -> None:
    config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=50)
    found = kinds(block_layers(DistilBertForSequenceClassification(config)))
    assert not any("classifier" in name for name in found)
    assert len(found) == 6


def test_weights_tied_to_embeddings_are_never_matched() -> None:
    model = BertForMaskedLM(tiny.config())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert "cls.predictions.decoder" not in prunable_layers(model)
    with pytest.raises(RecipeError, match="matches no linear layer"):
        match_layers(model, ["*decoder"])


def test_model_without_linear_layers_says_so() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))
    with pytest.raises(RecipeError, match="no linear layers of its own at all"):
        match_layers(model, None)


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (
            ["*.nothing"],
            [],
            r"targets '\*\.nothing' matches no linear layer .* could match: .*intermediate\.dense \(2\)",
        ),
        (None, ["*.nothing"], r"exclude '\*\.nothing' matches no linear layer"),
        (["classifier"], ["class*"], r"without \['class\*'\] match no linear layer"),
    ],
)
def test_globs_that_leave_nothing_are_errors(targets: Any, exclude: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        match_layers(bert(), targets, exclude)


def test_globs_match_layers_and_their_weights() -> None:
    assert list(match_layers(bert(), ["classifier"])) == list(match_layers(bert(), ["classifier.weight"]))
    assert len(match_layers(bert(), ["*.attention.*"], ["*.query"])) == 6


def test_weight_in_two_groups_is_an_error() -> None:
    groups: list[Any] = [{"targets": "*.attention.*", "sparsity": 0.5}, {"sparsity": 0.9}]
    with pytest.raises(RecipeError, match=r"'bert\.encoder.*' is in group 0 and in group 1"):
        Pruner(bert(), SparsityConfig(groups=groups))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"name": "block", "rows": 12, "cols": 8}, r"block 12x8 needs the output dimension to be a multiple of 12"),
        ({"name": "block", "rows": 8, "cols": 12}, r"block 8x12 needs the input dimension to be a multiple of 12"),
        (
            "3:5",
            r"3:5 needs the input dimension to be a multiple of 5, but 'bert\..*' has shape \(32, 32\)\. Exclude it",
        ),
    ],
)
def test_pattern_that_does_not_divide_a_shape_is_an_error_and_leaves_the_model(pattern: Any, message: str) -> None:
    model = bert()
    config = {"pattern": pattern} if pattern == "3:5" else {"pattern": pattern, "sparsity": 0.5}
    with pytest.raises(PatternError, match=message):
        Pruner(model, SparsityConfig(**config))
    assert type(model.bert.encoder.layer[0].output.dense) is torch.nn.Linear
