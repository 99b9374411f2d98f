"""Default targets are the linear layers inside the blocks and nothing else; globs that match nothing say what could."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    SwitchTransformersConfig,
    SwitchTransformersModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse import PatternError, Pruner, RecipeError, SparsityConfig
from hf_sparse.modeling.layer_kinds import matrix_shape
from hf_sparse.modeling.layer_matching import block_layers, match_layers, prunable_layers
from tests.helpers import mixtures, tiny
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
    message = r"'cls\.predictions\.decoder' is tied to 'bert\.embeddings\.word_embeddings\.weight'"
    with pytest.raises(RecipeError, match=message):
        match_layers(model, ["*decoder"])
    with pytest.raises(RecipeError, match=message):
        match_layers(model, None, ["*decoder"])


def gpt2(cls: Any = GPT2LMHeadModel) -> Any:
    return cls(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))


def test_layers_of_gpt2_are_matched_though_their_weights_are_stored_the_other_way_round() -> None:
    layers = match_layers(gpt2(), None)
    assert len(layers) == 8
    assert [matrix_shape(layers[f"transformer.h.0.{name}"]) for name in ("attn.c_attn", "mlp.c_proj")] == [
        (48, 16), (16, 64),
    ]  # fmt: skip
    assert list(match_layers(gpt2(GPT2ForSequenceClassification), ["score"])) == ["score"]
    with pytest.raises(RecipeError, match=r"'lm_head' is tied to 'transformer\.wte\.weight'"):
        match_layers(gpt2(), ["lm_head"])


class Bilinear(nn.Module):
    """A model whose blocks have layers of no known kind alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Bilinear(4, 4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.score = nn.Linear(4, 2)


def test_model_of_unsupported_layers_names_them() -> None:
    kind = r"Its layers are 2 Bilinear \(layers\.\*\.\* \(2\)\), and only nn\.Conv1d, .* are supported"
    with pytest.raises(RecipeError, match=rf"the default targets match no layer of the model. {kind}"):
        match_layers(Bilinear(), None)
    with pytest.raises(RecipeError, match=rf"{kind}\. It could match: score \(1\)"):
        match_layers(Bilinear(), None)
    with pytest.raises(RecipeError, match=r"It matches 2 Bilinear \(first: 'layers\.0\.0'\), and only nn"):
        match_layers(Bilinear(), ["layers.?.0"])
    with pytest.raises(RecipeError, match=r"It matches the parameter 'layers\.0\.self_attn\.in_proj_weight', and only"):
        match_layers(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1), ["*in_proj_weight"])


@pytest.mark.parametrize(
    ("glob", "nearest"),
    [
        ("*.intermediate.dens", r"'\*\.intermediate\.dense'"),
        ("bert.encoder.layer.0.output.dnse", r"'bert\.encoder\.layer\.0\.output\.dense'"),
        ("clasifier", "'classifier'"),
        ("encoder.layer.*.querry", r"'\*\.(encoder\.)?layer\.\*\.attention\.self\.query'"),
    ],
)
def test_targets_with_a_typo_name_the_nearest_layers(glob: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"`targets` .* matches no layer of the model\. Did you mean .*{nearest}"):
        match_layers(bert(), [glob])


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (
            ["*.nothing"],
            [],
            r"`targets` '\*\.nothing' matches no layer .* could match: .*intermediate\.dense \(2\)",
        ),
        (None, ["*.nothing"], r"`exclude` '\*\.nothing' matches no layer"),
        (["classifier"], ["class*"], r"without \['class\*'\] match no layer"),
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


def test_routers_of_experts_are_no_default_targets() -> None:
    found = block_layers(mixtures.build("qwen2-moe"))
    assert "model.layers.0.mlp.shared_expert.gate_proj" in found
    assert not [name for name in found if name.endswith(("shared_expert_gate", "mlp.gate"))]
    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 2,
    }
    switch = SwitchTransformersModel(SwitchTransformersConfig(**sizes))
    routers = [name for name, module in switch.named_modules() if ".router" in name and isinstance(module, nn.Linear)]
    assert routers
    assert not set(routers) & set(block_layers(switch))
    assert any(name.endswith(".SelfAttention.q") for name in block_layers(switch))


def test_experts_of_unknown_layout_are_named_where_a_target_matches_them() -> None:
    model = mixtures.build("mixtral")
    for block in model.model.layers:
        del block.mlp.experts.is_transposed
    with pytest.raises(RecipeError, match=r"the parameter 'model.layers.0.mlp.experts.gate_up_proj', and only weights"):
        match_layers(model, ["*.experts"])
