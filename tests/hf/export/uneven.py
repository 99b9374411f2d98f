"""A BERT whose layers have different numbers of heads and neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertForSequenceClassification

from tests.helpers.tiny import config

NARROW: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}


HEADS, NEURONS = (3, 1), (40, 7)
"""What is left in each layer of the uneven BERT, of 4 heads and 64 neurons."""


def keep_rows(layer: nn.Linear, rows: int) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[:rows].clone())
    layer.bias = nn.Parameter(layer.bias.detach()[:rows].clone())
    layer.out_features = rows


def keep_columns(layer: nn.Linear, columns: int) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[:, :columns].clone())
    layer.in_features = columns


def uneven_bert() -> BertForSequenceClassification:
    """Return a BERT whose layers have different numbers of heads and neurons, cut by hand."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(num_labels=3, vocab_size=200))
    layers: Any = model.bert.encoder.layer
    for layer, heads, neurons in zip(layers, HEADS, NEURONS, strict=True):
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            keep_rows(getattr(attention, name), 8 * heads)
        keep_columns(layer.attention.output.dense, 8 * heads)
        attention.num_attention_heads, attention.all_head_size = heads, 8 * heads
        keep_rows(layer.intermediate.dense, neurons)
        keep_columns(layer.output.dense, neurons)
    return model.eval()
