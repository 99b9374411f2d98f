"""Loading of the packed BERT of these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def change_header(folder: Path, change: Callable[[dict[str, Any]], None], also_config: bool = True) -> None:
    """Rewrite the manifest in the file (and in config.json) without touching a tensor."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
        metadata = file.metadata()
    manifest = json.loads(metadata["hf_sparse"])
    change(manifest)
    save_file(tensors, path, metadata={**metadata, "hf_sparse": json.dumps(manifest)})
    if also_config:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["manifest"] = manifest
        (folder / "config.json").write_text(json.dumps(config))
