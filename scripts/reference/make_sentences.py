"""Write the unlabelled sentences that the embedding recipes train on, and none that they are measured on.

It also writes the pairs that a reranker is measured on, and none with a sentence that it was trained on.

    python scripts/reference/make_sentences.py --data DATA --output out/sentences --most 12000

DATA has the folders sst2, mrpc, stsb, rte, bbc-news and e2e-nlg with `train.jsonl` (and the validation files of stsb,
bbc-news and mrpc, whose sentences are left out). Two sentences are the same if they differ in case, spaces and
punctuation only. --most bounds the sentences of each dataset, drawn at random, so that none outweighs the others: sst2
alone has 60,000, most of them parts of sentences. Writes `sentences.jsonl` (columns "text" and "source"),
`held_out.jsonl` with every sentence that is measured, and `unseen_pairs.jsonl`: the validation pairs of stsb neither
sentence of which is in its training part, on which rerankers train with labels (255 of 1,500 pairs have such a one).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_sparse.utils.atomic_io import write_text

TRAIN: dict[str, tuple[str, ...]] = {
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "bbc-news": ("text",),
    "e2e-nlg": ("target",),
}
"""Columns of `train.jsonl` with text."""
MEASURED: dict[str, tuple[str, ...]] = {
    "stsb": ("sentence1", "sentence2"),
    "bbc-news": ("text",),
    "mrpc": ("sentence1", "sentence2"),
}
"""Columns of `validation.jsonl` that some recipe or benchmark measures."""
SHORTEST = 3
"""Words of a sentence; shorter ones say too little."""
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def key(sentence: str) -> str:
    """Return what two sentences share that differ in case, spaces and punctuation only.

    Example:
        >>> key("A man is  playing.") == key("a Man is playing")
        True
    """
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def sentences_of(text: str) -> list[str]:
    """Split a text into sentences.

    Example:
        >>> sentences_of("It rose 2.5 percent. Shares fell.")
        ['It rose 2.5 percent.', 'Shares fell.']
    """
    return [part.strip() for part in _END.split(text) if part.strip()]


def texts(data: Path, split: str, columns: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Yield every text of the named columns of a split, after the name of its dataset."""
    for name, wanted in columns.items():
        with (data / name / f"{split}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield from ((name, row[column]) for column in wanted)


def held_out(data: Path) -> list[str]:
    """Return every text that is measured, whole and cut into sentences."""
    found: dict[str, None] = {}
    for _, text in texts(data, "validation", MEASURED):
        found.update(dict.fromkeys([text, *sentences_of(text)]))
    return list(found)


def unseen_pairs(data: Path) -> list[dict[str, Any]]:
    """Return the validation pairs of STS-B of which no sentence is in its training part."""
    one = {"stsb": TRAIN["stsb"]}
    trained = {key(text) for _, text in texts(data, "train", one)}
    rows = map(json.loads, (data / "stsb" / "validation.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if not any(key(row[column]) in trained for column in MEASURED["stsb"])]


def training_sentences(
    data: Path, measured: set[str], passage: int = 4, most: int | None = None
) -> list[dict[str, str]]:
    """Return the sentences of the training files, and of each text with several the first few together.

    Args:
        data: folder with the datasets.
        measured: keys of the sentences to leave out.
        passage: sentences of the passage that is kept of a longer text, so that long inputs are seen too.
        most: sentences of each dataset, drawn at random; None = all.
    """
    found: dict[str, dict[str, str]] = {}
    for source, text in texts(data, "train", TRAIN):
        parts = [part for part in sentences_of(text) if key(part) not in measured]
        several = [" ".join(parts[:passage])] if len(parts) > 1 else []
        for sentence in [*parts, *several]:
            name = key(sentence)
            if name not in measured and len(name.split()) >= SHORTEST:
                found.setdefault(name, {"text": sentence, "source": source})
    drawn = random.Random(0)  # noqa: S311  a sample, no secret
    kept = []
    for source in TRAIN:
        own = [row for row in found.values() if row["source"] == source]
        kept += own if most is None or len(own) <= most else drawn.sample(own, most)
    return kept


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--most", type=int, metavar="N", help="sentences of each dataset (all)")
    options = parser.parse_args()
    measured = held_out(options.data)
    sentences = training_sentences(options.data, {key(sentence) for sentence in measured}, most=options.most)
    options.output.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[Any]] = {
        "sentences": sentences,
        "held_out": [{"text": text} for text in measured],
        "unseen_pairs": unseen_pairs(options.data),
    }
    for name, rows in files.items():
        write_text(options.output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} in {options.output / name}.jsonl")


if __name__ == "__main__":
    main()
