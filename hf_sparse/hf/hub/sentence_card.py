"""Cards of sentence-transformers: they keep their own sections, and get one about sparsity.

sentence-transformers writes the card of its models itself, after their weights are saved. The section stands between
two marks, so that it is replaced when the model is saved again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from ...errors import SparsityError
from ...utils.atomic_io import read_json, write_text
from .. import patches
from ..embedding.pooling import MODULES
from ..embedding.wrapper import BASE
from .model_card import CARD, CardFacts, facts_of, section_tables

logger = logging.get_logger(__name__)
BEGIN, END = "<!-- hf_sparse: begin -->", "<!-- hf_sparse: end -->"
_SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
KINDS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
TAGS = ("hf_sparse", "sparse", "pruning")


def watch_cards() -> None:
    """Let models of sentence-transformers add the section to their cards, once it is imported."""
    base = getattr(sys.modules.get(BASE), "BaseModel", None)
    if base is not None:
        patches.wrap(base, "_create_model_card", _create_model_card)


def _create_model_card(original: Callable[..., None], model: Any, path: str, *args: Any, **kwargs: Any) -> None:
    original(model, path, *args, **kwargs)
    try:
        add_section(path, type(model).__name__)
    except SparsityError as error:
        logger.warning("the card in %s has no section about sparsity: %s", path, error)


def add_section(folder: str | Path, kind: str, facts: CardFacts | None = None) -> None:
    """Add the section to the card of a saved model, or replace it; a dense model's card stays as it is.

    Args:
        kind: class of the model, as in `SentenceTransformer`.
        facts: what it says; None = what the files of the model say.

    Raises:
        CheckpointError: if the files of the model are missing or corrupted.
    """
    path = Path(folder) / CARD
    if not path.is_file() or not (Path(folder) / "config.json").is_file():
        return
    facts = facts or facts_of(folder)
    if facts.pruned:
        write_text(path, with_section(path.read_text(encoding="utf-8"), facts, kind))


def own_kind(folder: str | Path) -> str | None:
    """Return the class of the model of sentence-transformers in a folder whose card it wrote; else None."""
    folder = Path(folder)
    if not (folder / MODULES).is_file() or not (folder / CARD).is_file():
        return None
    kind = (read_json(folder / "config_sentence_transformers.json") or {}).get("model_type")
    return kind if kind in KINDS else KINDS[0]


def with_section(text: str, facts: CardFacts, kind: str) -> str:
    """Return a card with the section at its end, and with our tags among its own."""
    card = ModelCard(text, ignore_metadata_errors=True)
    metadata: Any = card.data
    metadata.license = facts.license or metadata.get("license")
    metadata.tags = list(dict.fromkeys([*(metadata.get("tags") or []), *TAGS]))
    tables = "\n\n".join(f"### {title}\n\n{body}" for title, body in section_tables(facts))
    loading = (
        f"```python\nimport hf_sparse  # first: it registers the format with transformers\n"
        f"from sentence_transformers import {kind}\n\n"
        f'model = {kind}("user/repo")  # or a folder\n'
        "hf_sparse.to_runtime(model)  # on a CPU: packed where that is faster\n```"
    )
    section = f"{BEGIN}\n\n## Sparsity\n\nPruned with hf_sparse.\n\n{loading}\n\n{tables}\n\n{END}\n"
    body = _SECTION.sub("\n", str(card)).rstrip("\n")
    return f"{body}\n\n{section}"
