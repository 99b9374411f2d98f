"""Check that documents, docstrings, comments and messages use the field's standard terms.

    python scripts/tools/check_words.py [FILE ...]     # all documents and the package, without arguments

Prints each private word with its place and the standard term, and exits with 1 if there is any. In Python files, string
literals of more than one word, docstrings and comments are read; names are not, nor are parts of a-name-like-this. A
line that has to keep such a word (a quotation, a key of the file format) ends with `words: ok`.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "recipes/**/*.md",
    "recipes/**/*.yaml",
    "scripts/**/*.md",
    "hf_sparse/**/*.md",
]
SOURCES = ["hf_sparse/**/*.py", "hf_sparse/**/*.html", "scripts/**/*.py", "scripts/**/*.sh"]
KEPT = "words: ok"

GLOSSARY = {
    r"\btexts\b": "examples (or samples, sequences)",
    r"\banswers?\b(?! the)": "predictions, outputs",
    r"\bkin\b": "family, variants",
    r"\bsingle (weights|zeros)\b": "unstructured sparsity",
    r"\bcut out\b": "pruned, removed (structured pruning)",
    r"\bproduct with the vocabulary\b": "LM head",
    r"\bsparse products?\b": "sparse matmul, sparse linear layer",
    r"\bin turns?\b": "interleaved",
    r"\bdense twins?\b": "dense baseline",
    r"\b(race|races|raced)\b": "benchmark, measurement",
    r"\bminds? pruning\b": "is sensitive to pruning",
    r"\b(taught|untaught|pupils?)\b": "distilled, with a teacher; student",
    r"\b(damaged?|damages)\b": "corruption, perturbed inputs",
    r"\b(set|sets|let|lets) free\b": "unfreeze",
    r"\bway back\b": "restore",
    r"\bstrangers?\b": "untrusted input",
    r"\b(lie|lies|stand|stands) beside\b": "is stored next to",
    r"\bsteered\b": "adjusted by a controller",
    r"\bnumbers of tokens\b": "sequence lengths, token counts",
    r"\bwaiting weights?\b": "lazy weights",
    r"\bno other (one )?beats\b": "Pareto front",
    r"\bgoes on from\b": "resumes from",
    r"(?<!there )\b(is|are|was|were) (?-i:no|none)\b(?! longer| more| less)": "is not a ...",
    r"\bsays? that (it|they)\b": "reports that",
    r"\bbe asked for\b|\b(is|was|are|were) asked for\b": "is requested",
    r"\b(is|are|was|were) told\b": "is notified, is given",
    r"\bhas no words\b": "cannot express",
    r"\bwhat (was|were) removed\b": "the pruned heads, neurons or weights",
    r"\bthe largest company\b": "the largest candidate group",
}
"""Pattern of a private word, and what the field says instead."""
RULES = [(re.compile(pattern, re.IGNORECASE), term) for pattern, term in GLOSSARY.items()]


class Finding(NamedTuple):
    """A private word, and where it is."""

    place: str
    word: str
    term: str


def findings(place: str, first: int, text: str) -> Iterator[Finding]:
    """Yield the private words of a text that begins in this line."""
    # A sentence may be broken anywhere, so lines are joined; offsets give the line back.
    joined = re.sub(r"\s", " ", text)
    lines = text.split("\n")
    for rule, term in RULES:
        for match in rule.finditer(joined):
            if joined[: match.start()].endswith("-") and joined[match.end() :].startswith("-"):
                continue  # part of a name, such as that of a reference result
            number = text.count("\n", 0, match.start())
            if KEPT not in lines[number]:
                yield Finding(f"{place}:{first + number}", match.group(), term)


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment and of each string literal with more than one word of a Python file."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        literal = token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None))
        prose = token.type == tokenize.COMMENT or (literal and " " in token.string.strip())
        if prose and KEPT not in lines[token.end[0] - 1]:
            yield token.start[0], token.string


def check(path: Path) -> list[Finding]:
    """Return the private words of a file."""
    text, place = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    if path.suffix != ".py":
        return list(findings(place, 1, text))
    return [found for line, prose in prose_of(text) for found in findings(place, line, prose)]


def files() -> list[Path]:
    """Return all documents and sources; not this file, which has to name the words."""
    found = {path for pattern in DOCUMENTS + SOURCES for path in ROOT.glob(pattern)}
    return sorted(found - {Path(__file__).resolve()})


def main() -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    found = [finding for path in parser.parse_args().files or files() for finding in check(path.resolve())]
    for place, word, term in found:
        print(f"{place}: {word!r}: use {term}")
    print(f"{len(found)} private words" if found else "The words are the field's own.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
