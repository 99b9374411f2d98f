"""Checkpoints that other programs wrote, and changes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FIXTURES = Path(__file__).parents[2] / "fixtures" / "import"


def copied(fixture: str, folder: Path) -> Path:
    return shutil.copytree(FIXTURES / fixture, folder, ignore=shutil.ignore_patterns("expected.safetensors"))


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= values
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)
