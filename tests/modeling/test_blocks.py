"""Where transformer blocks are: never in a task head, in every family of transformers; and what of them is covered."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn

from hf_sparse import RecipeError, SparsityConfig, sparsify, summarize
from hf_sparse.modeling.blocks import block_coverage, block_prefixes
from hf_sparse.modeling.layer_matching import block_layers
from tests.helpers.families import class_names, on_meta
from tests.helpers.layers import attached
from tests.helpers.training import bert

HEADS = {
    "DetrForObjectDetection": "bbox_predictor",
    "YolosForObjectDetection": "class_labels_classifier",
    "SegformerForSemanticSegmentation": "decode_head",
    "MusicgenForCausalLM": "lm_heads",
    "MusicgenForConditionalGeneration": "decoder.lm_heads",
    "GroundingDinoForObjectDetection": "model.decoder.bbox_embed",
    "DFineForObjectDetection": "model.decoder.class_embed",
    "Wav2Vec2ForXVector": "tdnn",
    "BarkModel": "fine_acoustics.lm_heads",
    "DPTForSemanticSegmentation": "neck.reassemble_stage",
    "GPTNeoXForCausalLM": "lm_head",
    "PPDocLayoutV2ForObjectDetection": "reading_order",  # a PreTrainedModel beside the base model
    "BartForSequenceClassification": "classification_head",
}


def leaks(model: Any) -> set[str]:
    """Return the default targets of a task model that its base model alone does not have."""
    base = model.base_model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    return set(block_layers(model)) - {prefix + name for name in block_layers(base)}


@pytest.mark.parametrize("name", HEADS)
def test_heads_in_lists_are_no_default_targets(name: str) -> None:
    model = on_meta(name)
    chosen = block_layers(model)
    assert chosen
    assert any(key.startswith(HEADS[name]) for key, _ in model.named_modules())
    assert not any(key.startswith(HEADS[name]) for key in chosen)


@pytest.mark.slow
def test_default_targets_of_every_task_model_are_those_of_its_base_model() -> None:
    built, wrong, empty = 0, {}, []
    for name in class_names():
        model = on_meta(name)
        if model is None:
            continue
        built += 1
        if extra := leaks(model):
            wrong[name] = sorted(extra)[:3]
        linear = sum(isinstance(module, nn.Linear) for module in model.base_model.modules())
        if linear > 8 and not block_layers(model):
            empty.append(name)
    assert wrong == {}
    assert empty == ["MgpstrForSceneTextRecognition"]  # its blocks are an nn.Sequential
    assert built > 1000


FAMILIES: dict[str, set[str]] = {
    "BertForMaskedLM": {"bert.encoder.layer."},
    "T5ForConditionalGeneration": {"encoder.block.", "decoder.block."},
    "LlamaForCausalLM": {"model.layers."},
    "ViTForImageClassification": {"vit.layers."},
    "SwinForImageClassification": {"swin.encoder.layers."},
    "WhisperForConditionalGeneration": {"model.encoder.layers.", "model.decoder.layers."},
    "CLIPModel": {"text_model.encoder.layers.", "vision_model.encoder.layers."},
    "XLMModel": {"attentions.", "ffns."},
    "AlbertForMaskedLM": {"albert.encoder.albert_layer_groups."},
    "XLNetForSequenceClassification": {"transformer.layer."},
    "MambaForCausalLM": {"backbone.layers."},
    "FNetForMaskedLM": {"fnet.encoder.layer."},
    "LxmertForQuestionAnswering": {"lxmert.encoder.layer.", "lxmert.encoder.x_layers.", "lxmert.encoder.r_layers."},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_a_family(name: str) -> None:
    assert set(block_prefixes(on_meta(name))) == FAMILIES[name]


class Around(nn.Module):
    """A model of one's own around one of transformers, or around an encoder of torch."""

    def __init__(self, encoder: nn.Module, **parts: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        for name, part in parts.items():
            self.add_module(name, part)


def linears(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(32, 3) for _ in range(count)])


def with_norm() -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3)) for _ in range(2)])


def of_torch() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)


OWN: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear heads": (lambda: Around(bert().bert, outputs=linears()), {"encoder.encoder.layer."}),
    "deeper heads": (lambda: Around(bert().bert, outputs=with_norm()), {"encoder.encoder.layer."}),
    "a task model inside": (lambda: Around(bert(), outputs=with_norm()), {"encoder.bert.encoder.layer."}),
    "an encoder of torch": (lambda: Around(of_torch(), outputs=with_norm()), {"encoder.layers."}),
    "blocks around a model": (
        lambda: Around(bert().bert, decoder=of_torch(), outputs=linears()),
        {"encoder.encoder.layer.", "decoder.layers."},
    ),
    "blocks without attention": (lambda: Around(nn.Linear(4, 32), mixers=with_norm(), heads=with_norm()), {"mixers."}),
}


@pytest.mark.parametrize("name", OWN)
def test_blocks_of_own_modules(name: str) -> None:
    build, expected = OWN[name]
    assert set(block_prefixes(build())) == expected


def test_own_module_with_nothing_but_heads_has_no_default_targets() -> None:
    model = Around(nn.LSTM(8, 32), outputs=linears())
    with pytest.raises(RecipeError, match=r"default targets match no layer .* could match: outputs\.\* \(2\)"):
        sparsify(model, SparsityConfig(sparsity=0.5))


MOE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PARTIAL: dict[str, tuple[Callable[[], Any], float, str]] = {
    # Attention 2 * 32 * 32 + 2 * 32 * 16 = 3072; experts 4 * (128 * 32 + 32 * 64) = 24576; router 4 * 32 = 128.
    "Mixtral": (
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4)),
        3072 / 27776,
        r"model\.layers\.\*\.mlp\.experts\.gate_up_proj \(parameter\): 59\.0%",
    ),
    # Feed-forward 2 * 32 * 64 = 4096; q, k, v, o, r 5 * 32 * 32 = 5120; biases and tables of 32 in (n_head, d_head).
    "XLNet": (
        lambda: transformers.XLNetForSequenceClassification(
            transformers.XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=64)
        ),
        4096 / (4096 + 5120 + 3 * 32 + 2 * 32),
        r"transformer\.layer\.\*\.rel_attn\.q \(parameter\): 10\.9%",
    ),
    # Feed-forward 2 * 32 * 64, out_proj 32 * 32; in_proj_weight 3 * 32 * 32.
    "nn.TransformerEncoder": (of_torch, 5120 / 8192, r"layers\.\*\.self_attn\.in_proj_weight \(parameter\): 37\.5%"),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_pruning_is_named_once_with_its_share(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, share, kind = PARTIAL[name]
    model = build()
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        sparsify(model, SparsityConfig(sparsity=0.9))
    (record,) = [record for record in caplog.records if record.name.startswith("hf_sparse")]
    assert f"have {share:.1%} of the weights in the blocks" in record.message
    assert re.search(kind, record.message), record.message
    assert ("'*.experts'" in record.message) == (name == "Mixtral")  # only where there are some
    assert ("No target can name" in record.message) == (name != "Mixtral")
    report = summarize(model)
    assert report.block_share == pytest.approx(share)
    assert f"targeted weights are {share:.1%} of the weights in the transformer blocks" in str(report)


@pytest.mark.parametrize(
    ("build", "group"),
    [
        (bert, {}),
        (bert, {"pattern": "head"}),
        (of_torch, {"targets": "*.linear1"}),
        (lambda: transformers.T5Model(transformers.T5Config(d_model=16, d_ff=32, num_layers=1, vocab_size=50)), {}),
    ],
    ids=["all covered", "structures", "targets by name", "tables of embeddings"],
)
def test_no_warning_where_nothing_was_missed(
    build: Callable[[], Any], group: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        sparsify(build(), SparsityConfig(sparsity=0.5, **group))
    assert not [record for record in caplog.records if record.name.startswith("hf_sparse")]


def test_coverage_does_not_depend_on_masks() -> None:
    model = of_torch()
    names = list(block_layers(model))
    before = block_coverage(model, names)
    pruner = attached(model, targets=None, scorer="movement", sparsity=0.5)
    assert block_coverage(model, names) == before
    pruner.bake()
    assert block_coverage(model, names) == before
    partial = block_coverage(bert(), [name for name in block_layers(bert()) if "query" in name])
    # Query of four square weights, beside a feed-forward part of two twice as large.
    assert partial.share == pytest.approx(1 / 8)
    assert partial.missed == {}
    assert block_coverage(nn.Sequential(nn.Linear(2, 2)), ["0"]).share == 1.0
