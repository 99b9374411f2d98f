"""Models of every family that has heads and neurons, so small that tests can afford them all, and ways to hurt them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    MT5Config,
    MT5ForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from hf_sparse.modeling.architectures import Part, SubBlock, find_sub_blocks
from hf_sparse.modeling.layer_kinds import output_axis
from tests.helpers import large_weights

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}


def _bert_like(config: Any, model: Any) -> Callable[..., Any]:
    return lambda **options: model(config(**{**SIZES, **options}))


def _t5_like(config: Any, model: Any, **fixed: Any) -> Callable[..., Any]:
    return lambda **options: model(config(**{**T5_SIZES, **fixed, **options}))


def _distilbert(**options: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 12}
    config = DistilBertConfig(
        **sizes, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, **options
    )
    return DistilBertForSequenceClassification(config)


def _modernbert(**options: Any) -> Any:
    sizes = {key: value for key, value in SIZES.items() if "prob" not in key}
    sizes |= {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 6, "pad_token_id": 0}
    sizes |= {"attention_bias": True, "mlp_bias": True, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
    return ModernBertForSequenceClassification(ModernBertConfig(**{**sizes, "eos_token_id": 2, **options}))


DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 4,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "pooler_dropout": 0.0,
    "max_relative_positions": -1,
    "position_biased_input": False,
}

FAMILIES: dict[str, Callable[..., Any]] = {
    "bert": _bert_like(BertConfig, BertForSequenceClassification),
    "roberta": _bert_like(RobertaConfig, RobertaForSequenceClassification),
    "xlm-roberta": _bert_like(XLMRobertaConfig, XLMRobertaForSequenceClassification),
    "camembert": _bert_like(CamembertConfig, CamembertForSequenceClassification),
    "electra": _bert_like(ElectraConfig, ElectraForSequenceClassification),
    "deberta-v3": lambda **options: _bert_like(DebertaV2Config, DebertaV2ForSequenceClassification)(
        **DEBERTA | options
    ),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "mpnet": _bert_like(MPNetConfig, MPNetForSequenceClassification),
    "t5": _t5_like(T5Config, T5ForConditionalGeneration),
    "t5-gated": _t5_like(T5Config, T5ForConditionalGeneration, feed_forward_proj="gated-gelu"),
    "mt5": _t5_like(MT5Config, MT5ForConditionalGeneration, feed_forward_proj="gated-gelu"),
}
MAIN = ("bert", "t5", "t5-gated")
EAGER = ("deberta-v3", "mpnet")
"""Families that transformers computes eagerly alone."""


def build(family: str, seed: int = 0, **options: Any) -> Any:
    """Return a model of a family, see `large_weights.build`."""
    return large_weights.build(FAMILIES[family], ("Norm", "layer_norm"), seed, **options)


def batch(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Return three padded texts with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 7:] = 0
    shape, top = ((3, 7), VOCABULARY) if "t5" in family else ((3,), 2)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, top, shape, generator=generator)}


def choose(model: nn.Module, seed: int = 0) -> dict[str, list[int]]:
    """Return survivors for every sub-block: at least one, never all, different everywhere."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for block in find_sub_blocks(model, "a test"):
        count = int(torch.randint(1, block.groups, (1,), generator=generator))
        chosen[block.name] = sorted(torch.randperm(block.groups, generator=generator)[:count].tolist())
    return chosen


@torch.no_grad()
def remove_others(model: nn.Module, chosen: dict[str, list[int]]) -> None:
    """Zero all that belongs to heads and neurons that do not survive; sub-blocks that are not chosen from stay.

    A KV head that several heads read is zero if none of them survives.
    """
    for block in find_sub_blocks(model, "a test"):
        if block.name in chosen:
            survivors = chosen[block.name]
            read = sorted({block.kv_of[head] for head in survivors}) if block.is_grouped else survivors
            _zero(block.exit, survivors)
            for part in block.parts:
                _zero(part, read if part.shared else survivors)


def _zero(part: Part, survivors: list[int]) -> None:
    lines = part.lines([each for each in range(part.count) if each not in survivors]).flatten()
    weight = part.layer.weight if part.axis == 0 else part.layer.weight.t()
    weight[lines] = 0.0
    if part.axis == output_axis(part.layer) and part.layer.bias is not None:
        part.layer.bias[lines] = 0.0


def live_lines(block: SubBlock, survivors: list[int]) -> dict[str, tuple[list[int], int]]:
    """Return for each parameter of a sub-block the lines of it that stay, and their dimension."""
    read = sorted({block.kv_of[head] for head in survivors}) if block.is_grouped else survivors
    found: dict[str, tuple[list[int], int]] = {}
    for part in (*block.parts, block.exit):
        lines = part.lines(read if part.shared else survivors).flatten().tolist()
        earlier, _ = found.get(f"{part.name}.weight", ([], 0))  # of a fused projection
        found[f"{part.name}.weight"] = (sorted([*earlier, *lines]), part.axis)
        if part is not block.exit:
            found[f"{part.name}.bias"] = (found[f"{part.name}.weight"][0], 0)
    return found
