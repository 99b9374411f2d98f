"""Layers of transformers whose weight is a matrix, beside `nn.Linear`: `Conv1D`, of which GPT-2 is made."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from ..modeling.layer_kinds import LayerKind, register_layer_kind

register_layer_kind(Conv1D, LayerKind(transposed=True))
