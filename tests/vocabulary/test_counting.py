"""Counting each word of a corpus once gives the counts of tokenizing all of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse.errors import RecipeError
from hf_sparse.vocabulary import counting, words
from hf_sparse.vocabulary.counting import count_tokens
from hf_sparse.vocabulary.tokenizer import read_tokenizer
from tests.helpers.tokenizers import CORPUS, KINDS

TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
PIECES = st.sampled_from(
    ["the", "fox", " ", " ", "  ", "\n", "\t", "\u3000", "12", ",", "dog", "\u6f22", "[MASK]", "\0", "\2"]
)
SEQUENCES = st.lists(PIECES, max_size=12).map("".join)


def plainly(kind: str, corpus: list[str]) -> np.ndarray:
    """Count by tokenizing every sequence."""
    tokenizer = TOKENIZERS[kind]
    total = np.zeros(len(tokenizer), np.int64)
    for sequence in corpus:
        for token in tokenizer.backend_tokenizer.encode(sequence, add_special_tokens=False).ids:
            total[token] += 1
    return total


def counted(kind: str, corpus: list[str]) -> counting.TokenCounts:
    """Count as trimming does."""
    tokenizer = TOKENIZERS[kind]
    return count_tokens(tokenizer.backend_tokenizer, corpus, len(tokenizer), read_tokenizer(tokenizer).data)


@pytest.mark.parametrize("kind", KINDS)
@given(corpus=st.lists(SEQUENCES, max_size=5), more=st.lists(SEQUENCES, max_size=5))
def test_counts_are_those_of_tokenizing_all(kind: str, corpus: list[str], more: list[str]) -> None:
    found = counted(kind, [*CORPUS, *corpus, *more])
    assert np.array_equal(found.tokens, plainly(kind, [*CORPUS, *corpus, *more]))
    assert found.examples == len(CORPUS) + len(corpus) + len(more)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_counted_once(kind: str) -> None:
    assert counted(kind, list(CORPUS)).whole is None


def test_corpus_may_be_a_generator_and_is_read_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def corpus() -> Iterator[str]:
        for _ in range(30):
            yield from CORPUS

    monkeypatch.setattr(counting, "BATCH", 100)
    monkeypatch.setattr(words, "WORDS", 5)
    tokenizer = TOKENIZERS["word_piece"]
    found = count_tokens(tokenizer.backend_tokenizer, corpus(), len(tokenizer), read_tokenizer(tokenizer).data)
    assert np.array_equal(found.tokens, 30 * plainly("word_piece", list(CORPUS)))
    assert found.characters == 30 * sum(map(len, CORPUS))


def test_truncation_and_padding_of_the_tokenizer_do_not_count_and_stay() -> None:
    tokenizer = KINDS["word_piece"]()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=50, pad_token="[PAD]")  # noqa: S106
    found = count_tokens(backend, CORPUS, len(tokenizer), read_tokenizer(tokenizer).data)
    assert found.tokens[tokenizer.pad_token_id] == 0
    assert found.total > 2 * len(CORPUS)
    assert (backend.truncation or {})["max_length"] == 2
    assert (backend.padding or {})["length"] == 50


def test_words_that_a_normalizer_changes_by_what_is_before_them_are_not_counted_once() -> None:
    from tokenizers import normalizers

    tokenizer = KINDS["byte_bpe"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("fox jumps", "dog")
    found = count_tokens(tokenizer.backend_tokenizer, CORPUS, len(tokenizer), read_tokenizer(tokenizer).data)
    assert found.whole == "normalizer Replace"
    ids = [tokenizer.backend_tokenizer.encode(sequence, add_special_tokens=False).ids for sequence in CORPUS]
    assert found.total == sum(map(len, ids))


def test_text_that_utf_8_cannot_encode_is_refused_with_its_position() -> None:
    with pytest.raises(RecipeError, match="half of a surrogate pair in the sequence at position 1"):
        list(counting.batches(["a", "\ud800 a"]))
