"""Loading of the packed BERT of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)
