"""Folders of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_run(folder: Path, accuracy: float, sparsity: Any = None, seed: int = 0, steps: int = 10) -> str:
    """Write what `hf-sparse train` leaves of a run that can be compared."""
    folder.mkdir()
    recipe = {"model": {"name": "m"}, "data": {"text": "t"}, "training": {"max_steps": steps}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "sparsity": sparsity, "seed": seed}))
    (folder / "eval_results.json").write_text(json.dumps({"eval_accuracy": accuracy}))
    return str(folder)
