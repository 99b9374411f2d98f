from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse import RecipeError
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.recipe.texts import TokenStream, read_text
from tests.helpers import oneshot


def tokens(count: int, prefix: tuple[int, ...] = ()) -> TokenStream:
    return TokenStream(tuple(range(100, 100 + count)), prefix, ("<s>",) * len(prefix))


def scored(stream: TokenStream, *args: Any, **options: Any) -> list[int]:
    """Return the tokens that windows score, in order."""
    return [int(i) for window in stream.windows(*args, **options) for i in window.ids[0, -window.scored :]]


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("count", [2, 7, 8, 20, 21])
def test_each_token_is_scored_once_by_the_windows(count: int, stride: int | None) -> None:
    assert scored(tokens(count, (1,)), 8, stride) == list(range(100, 100 + count))


def test_without_a_prefix_nothing_predicts_the_first_token_of_a_window() -> None:
    assert scored(tokens(16), 8) == [*range(101, 108), *range(109, 116)]
    assert scored(tokens(16), 8, 4) == list(range(101, 116))  # what overlaps has context


def test_windows_begin_with_bos_and_are_counted() -> None:
    windows = list(tokens(20, (1,)).windows(8, most=2))
    assert [window.ids.tolist() for window in windows] == [[[1, *range(100, 107)]], [[1, *range(107, 114)]]]
    assert [window.scored for window in windows] == [7, 7]


def test_overlapping_windows_score_their_new_tokens_with_more_context() -> None:
    windows = list(tokens(12, (1,)).windows(8, 2))
    assert [window.ids.tolist()[0] for window in windows] == [
        [1, *range(100, 107)], [1, *range(102, 109)], [1, *range(104, 111)], [1, *range(106, 112)],
    ]  # fmt: skip
    assert [window.scored for window in windows] == [7, 2, 2, 1]


@pytest.mark.parametrize(("length", "stride", "match"), [(2, None, "length"), (8, 0, "stride"), (8, 8, "stride")])
def test_windows_without_room_are_refused(length: int, stride: int | None, match: str) -> None:
    with pytest.raises(RecipeError, match=f"`{match}` must be"):
        list(tokens(20, (1,)).windows(length, stride))


def test_samples_are_from_random_places_the_same_for_a_seed() -> None:
    stream = tokens(100, (1,))
    first, again, other = (stream.samples(5, 8, seed) for seed in (0, 0, 1))
    assert [s.tolist() for s in first] == [s.tolist() for s in again] != [s.tolist() for s in other]
    for sample in first:
        assert sample.shape == (1, 8)
        assert sample[0, 0] == 1
        assert (sample[0, 2:] - sample[0, 1:-1]).eq(1).all()
    with pytest.raises(RecipeError, match="has 100 tokens, and one sequence needs 199"):
        stream.samples(5, 200)


@pytest.mark.parametrize(("bos", "expected"), [("auto", (1,)), ("never", ()), ("always", (1,))])
def test_bos_is_what_the_tokenizer_puts_before_a_text(tmp_path: Path, bos: Any, expected: tuple[int, ...]) -> None:
    with_bos = TokenStream.of("w0 w1", load_tokenizer(str(oneshot.save_llama(tmp_path / "a"))), bos)
    assert (with_bos.ids, with_bos.prefix) == ((3, 4), expected)
    assert with_bos.begins == ("each begins with <s>" if expected else "without BOS")
    without = TokenStream.of("w0 w1", load_tokenizer(str(oneshot.save_llama(tmp_path / "b", bos=False))), bos)
    assert without.prefix == (expected if bos == "always" else ())


def test_texts_are_read_from_plain_files_and_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    rows = [json.dumps({"body": text}) for text in ("one", "two")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "one\ntwo"
    assert read_text(tmp_path / "a.jsonl", "body") == "one\n\ntwo"
    with pytest.raises(RecipeError, match="has no column 'text'"):
        read_text(tmp_path / "a.jsonl")
    with pytest.raises(RecipeError, match="cannot read the text"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(RecipeError, match=r"must be a file with suffix \.txt"):
        read_text(tmp_path / "a.bin")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(RecipeError, match="has no text"):
        read_text(tmp_path / "empty.txt")
