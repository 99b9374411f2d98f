"""Inference: sparse layers packed for the kernels of this machine, and restored."""

from .autotune import SpeedTable
from .convert import BACKENDS, backends, is_runtime, to_dense_runtime, to_runtime
from .report import LayerReport, RuntimeReport

__all__ = [
    "BACKENDS",
    "LayerReport",
    "RuntimeReport",
    "SpeedTable",
    "backends",
    "is_runtime",
    "to_dense_runtime",
    "to_runtime",
]
