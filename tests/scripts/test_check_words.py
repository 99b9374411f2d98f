"""Private words are found in prose, with their line, and not in names."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.tools import check_words


def found(tmp_path: Path, name: str, text: str) -> list[tuple[str, str]]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return [(finding.place.rpartition(":")[2], finding.word) for finding in check_words.check(path)]


def test_words_of_a_document_are_found_with_their_line(tmp_path: Path) -> None:
    text = "# Title\n\nPrune single\nweights. There is no compiler.\nThat is no folder.\n"
    assert found(tmp_path, "a.md", text) == [("3", "single weights"), ("5", "is no")]


def test_docstrings_messages_and_comments_are_read_and_names_are_not(tmp_path: Path) -> None:
    source = (
        '"""Read the texts."""\n'
        "texts = answers = x is None\n"
        'key = "texts"\n'
        "def f():\n"
        '    raise ValueError("the model\'s answers differ")  # in turns\n'
    )
    assert found(tmp_path, "a.py", source) == [("1", "texts"), ("5", "answers"), ("5", "in turns")]


def test_line_that_has_to_keep_a_word_is_marked(tmp_path: Path) -> None:
    assert found(tmp_path, "a.py", "# texts  words: ok\n# texts\n") == [("2", "texts")]


def test_parts_of_names_with_hyphens_are_not_read(tmp_path: Path) -> None:
    assert found(tmp_path, "a.md", "movement-95-taught-by-l3\nself-taught\n") == [("2", "taught")]


@pytest.mark.parametrize("word", ["texts", "kin", "cut out", "dense twin", "taught", "in turns", "numbers of tokens"])
def test_every_word_has_a_term(word: str) -> None:
    assert [finding.term for finding in check_words.findings("a", 1, f"x {word} y") if finding.word == word]


def test_documents_and_sources_are_found() -> None:
    names = {str(path.relative_to(check_words.ROOT)) for path in check_words.files()}
    assert {"README.md", "recipes/GUIDE.md", "hf_sparse/pruning/pruner.py", "scripts/demo.sh"} <= names
