"""GGUF files: unpacked by transformers itself, then read like any other checkpoint.

Peak memory: the whole model in float32, 4 bytes for each parameter, and a third more (measured by
scripts/benchmarks/bench_import.py); as much again on the disk, in a temporary folder. Weights come out as the
quantization of the file rounded them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...errors import BackendError, CheckpointError

_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantized to float32, its config and its tokenizer into a folder.

    Raises:
        BackendError: if the package `gguf` is not installed.
        CheckpointError: if transformers cannot read the file.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BackendError("reading GGUF needs the package gguf: pip install gguf") from error
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    settings = getattr(transformers, "GgufConfig", None)  # until 5.22 all GGUF files were dequantized
    if settings is not None:
        place["quantization_config"] = settings(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        cls = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else transformers.AutoModel
        model: Any = cls.from_pretrained(**place, dtype=torch.float32)
        for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, name):
                delattr(owner, name)
        model.save_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"transformers cannot read {path}: {error}") from error
    with contextlib.suppress(Exception):  # what it cannot rebuild is missing in the output, and loading it says so
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
