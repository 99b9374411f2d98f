"""A BERT of a few thousand weights and a few sentences that it can learn, all made here: no network, no data folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    ByT5Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

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


def save_t5(folder: Path) -> Path:
    """Write a gated T5 with random weights and a tokenizer of bytes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 384,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    }
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def write_spellings(path: Path, words: str) -> Path:
    """Write words and their letters with spaces between, as JSON lines with the columns source and target."""
    rows = [json.dumps({"source": word, "target": " ".join(word)}) for word in words.split()]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def sentences() -> list[tuple[str, int]]:
    """Return 24 sentences with label 1 for a good word and 0 for a bad one."""
    pairs = itertools.product(NOUNS, (*GOOD, *BAD))
    return [(f"the {noun} is {word}", int(word in GOOD)) for noun, word in pairs]


def write_sentences(path: Path, rows: slice = slice(None), repeat: int = 1) -> Path:
    """Write sentences as JSON lines with the columns text and label."""
    lines = [json.dumps({"text": text, "label": label}) for text, label in sentences()[rows]]
    path.write_text("\n".join(lines * repeat) + "\n", encoding="utf-8")
    return path
