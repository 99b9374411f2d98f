"""The training data in a training checkpoint: what of them can be compared without reading all of them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

EXAMPLES = 64
"""Examples whose content is compared, evenly spread over the dataset."""
_CHARACTERS = 100_000
"""Of each example, as text."""


def data_facts(dataset: Any) -> dict[str, Any]:
    """Return what a resume compares of a training dataset, in plain JSON types; empty where nothing is known of it.

    Of every dataset that has a length, that counts. Of a `datasets.Dataset` the columns count too, and the content of
    `EXAMPLES` examples, as it is stored: any other dataset may give another item at each access.

    Example:
        >>> data_facts([{"text": "a"}, {"text": "b"}])
        {'examples': 2}
    """
    try:
        facts: dict[str, Any] = {"examples": len(dataset)}
    except TypeError:  # an IterableDataset, or none
        return {}
    if hasattr(dataset, "with_format") and getattr(dataset, "column_names", None):
        facts["columns"] = sorted(dataset.column_names)
        facts["content"] = _content(dataset, facts["examples"])
    return facts


def _content(dataset: Any, count: int) -> str:
    # The table of Arrow: no transform, and no picture or sound is decoded. Those are structs, with paths of a machine.
    stored = dataset.with_format("arrow")
    digest = hashlib.blake2b(digest_size=16)
    for index in sorted({count * number // EXAMPLES for number in range(EXAMPLES)} if count else ()):
        table = stored[index]
        plain = [name for name in sorted(table.column_names) if "struct" not in str(table[name].type)]
        row = {name: table[name][0].as_py() for name in plain}
        digest.update(json.dumps(row, sort_keys=True, default=str)[:_CHARACTERS].encode())
    return digest.hexdigest()
