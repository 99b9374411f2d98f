"""A BERT of a few thousand weights and a few sentences that it can learn, all made here: no network, no data folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

GOOD, BAD = ("great", "fine", "lovely"), ("awful", "poor", "dull")
NOUNS = ("film", "plot", "cast", "end")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def save_tokenizer(folder: Path) -> None:
    """Write a WordPiece tokenizer that knows the words of `sentences`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, "the", "is", *GOOD, *BAD, *NOUNS]) + "\n", encoding="utf-8")
    BertTokenizer(str(vocabulary), model_max_length=16).save_pretrained(folder)


def config(**options: Any) -> BertConfig:
    """Return the config of a BERT with two layers of four heads, 32 wide."""
    sizes: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + 2 + len(GOOD) + len(BAD) + len(NOUNS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    }
    return BertConfig(**{**sizes, **options})


def save_bert(folder: Path, head: bool = False) -> Path:
    """Write a model with random weights, with or without a head for two classes, and its tokenizer."""
    torch.manual_seed(0)
    made = BertForSequenceClassification(config(num_labels=2)) if head else BertModel(config())
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentences() -> list[tuple[str, int]]:
    """Return 24 sentences with label 1 for a good word and 0 for a bad one."""
    pairs = itertools.product(NOUNS, (*GOOD, *BAD))
    return [(f"the {noun} is {word}", int(word in GOOD)) for noun, word in pairs]


def write_sentences(path: Path, rows: slice = slice(None), repeat: int = 1) -> Path:
    """Write sentences as JSON lines with the columns text and label."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in sentences()[rows]]
    path.write_text("\n".join(lines * repeat) + "\n", encoding="utf-8")
    return path
