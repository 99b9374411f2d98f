"""The sequences with which bench_vocabulary.py trims and evaluates."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HELD_OUT = 2000
WINDOW = 128


def rows(data: Path, name: str, split: str, column: str) -> list[Any]:
    """Return a column of a file of JSON lines."""
    with (data / name / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)[column] for line in file]


def corpus(data: Path) -> tuple[list[str], list[str]]:
    """Return the sequences to count, and 2,000 others."""
    bbc, sst2 = (rows(data, name, "train", column) for name, column in (("bbc-news", "text"), ("sst2", "sentence")))
    held = rows(data, "bbc-news", "validation", "text") + rows(data, "sst2", "validation", "sentence")
    held = list(dict.fromkeys(held + sst2[::-1]))[:HELD_OUT]
    others = set(held)
    return [sequence for sequence in bbc + sst2 if sequence not in others], held


def strings(data: Path, tokenizer: Any, count: int) -> list[str]:
    """Return the first paragraphs of WikiText-2 test, joined to strings of about `WINDOW` tokens."""
    lines = (data / "wikitext2" / "test.txt").read_text(encoding="utf-8").split("\n")
    found, window = [], ""
    for line in lines:
        joined = f"{window}\n{line}" if window else line
        if len(tokenizer(joined)["input_ids"]) > WINDOW and window:
            found.append(window)
            joined = line
        window = joined
        if len(found) == count:
            break
    return found


def decoder_corpus(data: Path) -> tuple[list[str], list[str]]:
    """Return the sequences to count for a decoder, and held-out ones."""
    count, held = corpus(data)
    return count + (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").split("\n"), held


def prose(data: Path) -> Iterator[str]:
    """Yield sequences of 1 to 12 sentences of all data sets in random order, without end."""
    columns = {"bbc-news": ["text"], "sst2": ["sentence"], "e2e-nlg": ["target"]}
    columns |= {name: ["sentence1", "sentence2"] for name in ("mrpc", "rte", "stsb")}
    found = [text for name, names in columns.items() for column in names for text in rows(data, name, "train", column)]
    found += [line for part in ("valid", "test") for line in
              (data / "wikitext2" / f"{part}.txt").read_text(encoding="utf-8").split("\n") if line.strip()]  # fmt: skip
    sentences = [sentence for text in found for sentence in re.split(r"(?<=[.!?]) ", text)]
    pick = random.Random(0)  # noqa: S311
    while True:
        yield " ".join(pick.choices(sentences, k=pick.randint(1, 12)))


def sources() -> Iterator[str]:
    """Yield the paragraphs of installed Python files."""
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        yield from path.read_text("utf-8", errors="ignore").split("\n\n")
