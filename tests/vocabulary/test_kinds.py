"""Kinds of tokenizers by hand: which tokens need which, and what is left of the JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hf_sparse.vocabulary.choice import Criteria, choose
from hf_sparse.vocabulary.kinds import BPE, KINDS, Unigram, WordPiece
from hf_sparse.vocabulary.tokenizer import TokenizerFile

LETTERS = ["a", "b", "c", "d"]


def bpe(merges: list[Any], **options: Any) -> BPE:
    """Return a BPE over a, b, c, d."""
    tokens = [*LETTERS, *dict.fromkeys(first + second for first, second in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return BPE({"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": None, **options})


def names(kind: Any, ids: Any) -> set[str]:
    texts = {token: text for text, token in kind.ids.items()}
    return {texts[token] for token in ids}


def kept(kind: Any, *tokens: str, **criteria: Any) -> set[str]:
    """Return what is kept where these tokens are requested."""
    requested = {kind.ids[token] for token in tokens}
    counts = np.zeros(len(kind.ids), np.int64)
    found = choose(kind, Criteria(**criteria), counts, (), requested, len(counts))
    return names(kind, found.kept)


def test_bpe_keeps_the_merges_that_make_a_token_and_no_others() -> None:
    kind = bpe([("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")])
    assert kept(kind, "abcd") == {*LETTERS, "ab", "cd", "abcd"}
    assert kept(kind, "bc") == {*LETTERS, "bc"}
    trimmed = kind.trimmed({0: 0, 1: 1, 2: 2, 3: 3, 4: 4}.get)
    assert trimmed["merges"] == [["a", "b"]]
    assert trimmed["vocab"] == {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4}


def test_bpe_replays_a_token_that_can_be_made_in_two_ways() -> None:
    """`abc` is listed as a+bc first, but ab has the lower rank: BPE never gets to a+bc."""
    kind = bpe([("a", "b"), ("a", "bc"), ("b", "c"), ("ab", "c")])
    assert names(kind, kind.parts(kind.ids["abc"])) == {"ab", "c"}
    assert kept(kind, "abc") == {*LETTERS, "ab", "abc"}


def test_bpe_token_that_merging_does_not_make_keeps_all_its_merges() -> None:
    kind = bpe([("a", "b"), ("a", "bc"), ("bc", "d"), ("a", "bcd"), ("abc", "d")])
    assert names(kind, kind.parts(kind.ids["abcd"])) == {"a", "bcd", "abc", "d"}


def test_bpe_marks_of_words_belong_to_the_character() -> None:
    kind = BPE({"vocab": {"a": 0, "b</w>": 1, "ab</w>": 2, "b": 3, "ba": 4}, "unk_token": None,
                "merges": ["a b</w>", "b a"], "end_of_word_suffix": "</w>"})  # fmt: skip
    assert kind.characters() == {0, 1, 3}
    assert kind.parts(2) == {0, 1}
    assert kind.trimmed({0: 0, 1: 1, 2: 2, 3: 3}.get)["merges"] == [["a", "b</w>"]]
    prefixed = BPE({"vocab": {"a": 0, "##b": 1, "ab": 2, "##c": 3, "##bc": 4, "abc": 5}, "unk_token": None,
                    "merges": [["##b", "##c"], ["a", "##bc"], ["a", "##b"]],
                    "continuing_subword_prefix": "##"})  # fmt: skip
    assert prefixed.characters() == {0, 1, 3}
    assert (prefixed.parts(5), prefixed.parts(4)) == ({0, 4}, {1, 3})


def test_unigram_keeps_the_lowest_score_and_the_order() -> None:
    model = {"vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -9.0], ["b", -2.0], ["ba", -3.0]], "unk_id": 0}
    kind = Unigram(model)
    assert names(kind, kind.required()) == {"<unk>", "ab"}
    assert kept(kind) == {"<unk>", "a", "ab", "b"}
    trimmed = kind.trimmed({0: 0, 2: 1, 4: 2}.get)
    assert trimmed == {"vocab": [["<unk>", 0.0], ["ab", -9.0], ["ba", -3.0]], "unk_id": 0}


def test_word_piece_names_characters_without_a_token_of_their_own() -> None:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "ab": 3, "abX": 4, "[CLS]": 5}
    kind = WordPiece({"vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##"})
    assert kind.characters() == {1, 2}
    caveat = kind.caveat({0, 5})
    assert caveat is not None
    assert "1 characters ('X')" in caveat
    del vocab["abX"]
    assert kind.caveat({0, 5}) is None


@pytest.mark.parametrize(("drop", "left"), [(True, {*LETTERS, "ab"}), (False, {"a", "b", "ab"})])
def test_single_characters_stay_unless_they_may_go(drop: bool, left: set[str]) -> None:
    assert kept(bpe([("a", "b"), ("c", "d")]), "ab", keep_characters=drop) == left


def test_coverage_counts_what_stays_anyway() -> None:
    kind = bpe([("a", "b"), ("c", "d"), ("ab", "cd")])
    counts = np.array([90, 0, 0, 0, 6, 3, 1], np.int64)

    def chosen(**criteria: Any) -> set[str]:
        return names(kind, choose(kind, Criteria(**criteria), counts, (), (), 7).kept)

    assert chosen(coverage=0.9) == {*LETTERS}
    assert chosen(coverage=0.96) == {*LETTERS, "ab"}
    assert chosen(coverage=0.99) == {*LETTERS, "ab", "cd"}
    assert chosen(coverage=1.0) == chosen() == chosen(min_count=1) == set(kind.ids)
    assert chosen(min_count=3) == {*LETTERS, "ab", "cd"}
    assert chosen(min_count=4) == {*LETTERS, "ab"}
    curve = dict(choose(kind, Criteria(coverage=0.9), counts, (), (), 7).curve)
    assert (curve[0.9], curve[0.95], curve[0.98], curve[1.0]) == (4, 5, 6, 7)


def test_ids_of_post_processors_padding_and_added_tokens_follow() -> None:
    model = {"type": "WordPiece", "vocab": {"[CLS]": 0, "x": 1, "[SEP]": 2}, "unk_token": "[CLS]",
             "continuing_subword_prefix": "##"}  # fmt: skip
    template = {"type": "TemplateProcessing", "single": [], "pair": [],
                "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]}}}  # fmt: skip
    roberta = {"type": "RobertaProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 0], "trim_offsets": True}
    file = TokenizerFile({
        "model": model, "added_tokens": [{"content": "[SEP]", "id": 2}], "padding": {"pad_id": 2},
        "post_processor": {"type": "Sequence", "processors": [template, roberta, {"type": "ByteLevel"}]},
    })  # fmt: skip
    assert file.named() == {0, 2}
    data = json.loads(file.trimmed({0: 0, 2: 1}.get))
    found = data["post_processor"]["processors"]
    assert found[0]["special_tokens"]["[SEP]"]["ids"] == [1]
    assert (found[1]["sep"], found[1]["cls"], found[2]) == (["[SEP]", 1], ["[CLS]", 0], {"type": "ByteLevel"})
    assert (data["padding"], data["added_tokens"]) == ({"pad_id": 1}, [{"content": "[SEP]", "id": 1}])


def test_every_kind_is_registered_under_the_name_of_the_json() -> None:
    assert {"BPE", "Unigram", "WordPiece"} <= set(KINDS)
