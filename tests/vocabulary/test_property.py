"""500 random corpora and tokenizers: what is covered is tokenized as before, and what was decoded still is."""

from __future__ import annotations

import copy
import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from hf_sparse import trim_vocabulary
from tests.helpers.tokenizers import KINDS, is_covered, tokens_of

LETTERS = "abcdeAB\u00e9\u00df\u0434\u0436\u6f22\u5b57" + "0189" + ".,!'-"
WORDS = st.text(LETTERS, min_size=1, max_size=7)
SENTENCES = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
UNSEEN = st.text(LETTERS + string.ascii_letters + " \n\t\u0645\U0001f600", max_size=30)


def model(size: int) -> nn.Module:
    """Return the smallest model with a vocabulary."""
    return BertModel(BertConfig(vocab_size=size, hidden_size=2, num_attention_heads=1, num_hidden_layers=0,
                                intermediate_size=2, max_position_embeddings=2, pad_token_id=0))  # fmt: skip


CORPORA = given(
    training=st.lists(SENTENCES, min_size=1, max_size=12),
    corpus=st.lists(SENTENCES | UNSEEN, max_size=6),
    others=st.lists(SENTENCES | UNSEEN, max_size=6),
    extra=st.integers(0, 150),
    coverage=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
)


def examples(count: int) -> settings:
    """Return settings for so many corpora."""
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
@examples(10)
@CORPORA
def test_covered_sequences_are_tokenized_as_before(kind: str, **drawn: Any) -> None:
    check(kind, **drawn)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@CORPORA
def test_covered_sequences_of_500_corpora_are_tokenized_as_before(kind: str, **drawn: Any) -> None:
    check(kind, **drawn)


def check(kind: str, training: list[str], corpus: list[str], others: list[str], extra: int, coverage: float) -> None:
    floor = {"byte_bpe": 262, "byte_fallback_bpe": 280}.get(kind, 60)
    tokenizer = KINDS[kind](training, floor + extra)
    whole = copy.deepcopy(tokenizer)
    counted = any(tokens_of(tokenizer, sequence) for sequence in corpus)
    report = trim_vocabulary(
        model(len(tokenizer)), tokenizer, corpus, coverage=coverage if counted else None, keep=["[MASK]"]
    )
    vocab = tokenizer.get_vocab()
    assert set(vocab) <= set(whole.get_vocab())
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert report.tokens_after == len(vocab)
    assert report.coverage >= coverage - 1e-9
    for sequence in (*training, *corpus, *others):
        before, after = tokens_of(whole, sequence), tokens_of(tokenizer, sequence)
        if is_covered(before, vocab):
            assert after == before
            assert [vocab[token] for token in before] == tokenizer(sequence, add_special_tokens=False)["input_ids"]
        decoded = whole.decode(whole(sequence)["input_ids"], skip_special_tokens=True)
        if decoded == sequence:
            assert tokenizer.decode(tokenizer(sequence)["input_ids"], skip_special_tokens=True) == sequence
    if coverage == 1.0:
        assert all(is_covered(tokens_of(whole, sequence), vocab) for sequence in corpus)
