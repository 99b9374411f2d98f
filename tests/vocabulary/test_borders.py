"""Which tokenizers may be cut at spaces, and that cutting changes nothing where they may."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from hf_sparse.vocabulary.borders import CROSSING, find_borders
from hf_sparse.vocabulary.counting import count_tokens
from hf_sparse.vocabulary.words import HEAD, SPACE, Words, token_counts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = normalizers.Replace(" ", "\u2581")
LETTERS = ["\u2581", *"abce12,.<>'\u0301\u00e9\u6f22", "\n"]
PIECES = ["a", "b", "ab", "c", "E\u0301", "\u00e9", " ", " ", " ", "  ", "\n", "\t", "12", "1", ",", "'s", "<x>", "<y>",
          "\u200b", "\u00a8", "\u0301", "\u037a", "\u3000", "\u00a0", "\ufeff", "\u2581", "\u6f22", "\u0600", "\x1c",
          HEAD, SPACE, "> <", "\u0e33", "\ufdfa"]  # fmt: skip


def bpe(pairs: list[tuple[str, str]], **options: Any) -> models.BPE:
    """Return BPE of a few characters with these merges."""
    vocab = {text: index for index, text in enumerate(dict.fromkeys([*LETTERS, *("".join(pair) for pair in pairs)]))}
    return models.BPE({**vocab, "<unk>": len(vocab)}, pairs, unk_token="<unk>", fuse_unk=True, **options)  # noqa: S106


def byte_bpe() -> models.BPE:
    """Return BPE of bytes with a few merges."""
    pairs = [("\u0120", "a"), ("a", "b"), ("\u0120a", "b"), ("1", "2"), ("\u0120", "\u0120"), ("\u010a", "\u010a")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    return models.BPE({text: index for index, text in enumerate(tokens)}, pairs)


def unigram() -> models.Unigram:
    """Return Unigram of a few tokens."""
    tokens = ["<unk>", *LETTERS, "ab", "\u2581ab", "\u2581a", "12", "\u2581\u2581", "\u00e9"]
    return models.Unigram([(text, -float(index % 7)) for index, text in enumerate(tokens)], 0, False)


def word_piece() -> models.WordPiece:
    """Return WordPiece of a few tokens."""
    tokens = ["<unk>", "a", "b", "ab", "##b", "##c", "e", "1", "##2", ",", "'", "s", "<", ">", "\u6f22"]
    return models.WordPiece({text: index for index, text in enumerate(tokens)}, unk_token="<unk>")  # noqa: S106


MERGES = [
    ("a", "b"),
    ("\u2581", "a"),
    ("\u2581", "\u2581"),
    ("\u2581a", "b"),
    ("1", "2"),
    (">", "\u2581"),
    (">\u2581", "<"),
]


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of Qwen, Llama 3 and GPT-4o."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BERT = normalizers.BertNormalizer
T5 = normalizers.Sequence([normalizers.Strip(left=False), normalizers.Nmt(), normalizers.NFKC(),
                           normalizers.Replace(Regex(" {2,}"), "\u2581")])  # fmt: skip
LEGACY = normalizers.Sequence([normalizers.Prepend("\u2581"), MARKS])
CASES: dict[str, tuple[Any, Any, Any]] = {
    "bert": (word_piece, BERT(), pre_tokenizers.BertPreTokenizer()),
    "bert cased": (word_piece, BERT(lowercase=False, strip_accents=True), pre_tokenizers.BertPreTokenizer()),
    "whitespace": (word_piece, normalizers.NFD(), pre_tokenizers.Whitespace()),
    "gpt2": (byte_bpe, None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta": (byte_bpe, normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt4": (byte_bpe, normalizers.NFC(), byte_level(GPT4)),
    "gpt4o": (byte_bpe, None, byte_level(GPT4O)),
    "gpt2 by its pattern": (byte_bpe, normalizers.NFKC(), byte_level(GPT2)),
    "t5": (unigram, T5, pre_tokenizers.Metaspace()),
    "xlm-r": (unigram, T5, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])),
    "albert": (unigram, normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
               pre_tokenizers.Metaspace(prepend_scheme="first")),
    "gemma": (lambda: bpe(MERGES), MARKS, pre_tokenizers.Split(" ", "merged_with_previous")),
    "llama 2": (lambda: bpe(MERGES), LEGACY, None),
    "llama 2 by metaspace": (lambda: bpe(MERGES), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}  # fmt: skip


def built(name: str) -> Tokenizer:
    """Return a tokenizer with added tokens of several kinds."""
    model, normalizer, pre_tokenizer = CASES[name]
    backend = Tokenizer(model())
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens([AddedToken("<x>", lstrip=True), AddedToken("<y>", rstrip=True)])
    backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("ba a", normalized=True)])
    return backend


BUILT = {name: built(name) for name in CASES}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tokenize without a pool of threads, which costs more than these few words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25)
@given(corpus=st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), min_size=1, max_size=4))
@example(
    corpus=["ab > < ab", "a <x> b", "a <y> b", "a \u00a8b", "a \u200b b", "ab c\n ab", "", " ", "a b ", " ab", "ba a"]
)
def test_cutting_changes_nothing(name: str, corpus: list[str]) -> None:
    backend = BUILT[name]
    size = backend.get_vocab_size(True)
    data = json.loads(backend.to_str())
    assert find_borders(data).reason is None
    found = count_tokens(backend, corpus, size, data)
    assert found.whole is None
    assert found.tokens.tolist() == token_counts(backend, corpus, size).tolist()


def test_a_word_is_tokenized_once_and_spaces_beside_spaces_are_no_borders() -> None:
    with Words(BUILT["gpt2"], BUILT["gpt2"].get_vocab_size(True)) as words:
        assert words.split(["ab c  ab\n a", "", "ab ", "a"]) == [
            f"{HEAD}ab", f"c{SPACE}{SPACE}ab\n{SPACE}a", HEAD, f"{HEAD}ab{SPACE}", f"{HEAD}a"]  # fmt: skip
        words.add(["a b b a"] * 5)
    assert words.different == 3
    assert words.counts.sum() == 30  # " b" has no token of its own


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}}, "normalizer Replace"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "b$"}, "content": "c"}}, "normalizer Replace"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Later"}]}}, "normalizer Later"),
        ({"pre_tokenizer": None}, "BPE"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+ \w+|\s+"}, "behavior": "Isolated",
                            "invert": False}}, "BPE and pre-tokenizer Split"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r" ?\p{L}+"}, "behavior": "Isolated",
                            "invert": False}}, "BPE and pre-tokenizer Split"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "UnicodeScripts"}, {"type": "Whitespace"}]}},
         "pre-tokenizer UnicodeScripts"),
        ({"model": {"type": "BPE", "vocab": {}, "dropout": 0.1}}, "dropout of merges"),
        ({"added_tokens": [{"content": f"{i} b"} for i in range(CROSSING + 1)]},
         f"{CROSSING + 1} tokens over the borders of words"),
    ],
)  # fmt: skip
def test_what_is_not_proven_is_not_cut(change: dict[str, Any], reason: str) -> None:
    assert find_borders({**json.loads(BUILT["gpt2"].to_str()), **change}).reason == reason


def test_unigram_over_whole_sequences_is_not_cut_for_its_sums_are_rounded_otherwise() -> None:
    data = json.loads(BUILT["t5"].to_str())
    split = {**data["pre_tokenizer"], "split": False}
    assert find_borders({**data, "pre_tokenizer": split}).reason == "Unigram and pre-tokenizer Metaspace"


def test_a_proof_that_does_not_hold_is_found_out_on_the_first_sequences() -> None:
    backend, size = built("gpt2"), BUILT["gpt2"].get_vocab_size(True)
    claimed = json.loads(backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"b a|\s+"), "isolated")
    found = count_tokens(backend, ["ab ab"], size, claimed)
    assert found.whole is not None
    assert np.array_equal(found.tokens, token_counts(backend, ["ab ab"], size))
