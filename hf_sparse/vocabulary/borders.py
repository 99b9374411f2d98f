"""At which spaces a sequence may be cut, so that its parts are tokenized as in one piece.

A border is one space between two plain characters; what is right of it begins with that space. Cutting there changes
nothing if each step of the tokenizer allows it:

* added tokens: none reaches over a space, or takes the white space behind it;
* normalizers: each works on single characters, or on runs that a border cannot be in;
* pre-tokenizers: one of them begins a piece at every border, or ends one there, and the others work inside pieces;
* BPE without such a pre-tokenizer: no merge joins a space to what is before it. A few tokens that do are named, and
  sequences with their text are not cut.

What is not known to be so is not cut (`Borders.reason`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

JSON = Mapping[str, Any]

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""

CROSSING = 32
"""Most strings for which a corpus is searched before it is cut."""

_LOCAL_NORMALIZERS = frozenset(
    (
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "StripAccents",
        "Lowercase",
        "BertNormalizer",
        "Precompiled",
        "Nmt",
        "Prepend",
        "Strip",
    )
)
"""Normalizers of single characters and their marks, and of the ends of a sequence."""

_SPLITTERS = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"))
_LOCAL = frozenset(("Digits", "Punctuation", "ByteLevel", "Metaspace"))

_LETTERS = (r"\p{L}", r"\p{L}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}")
_SUFFIX = r"(\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\??)?"
_CLASS = rf"\[(?:{'|'.join(map(re.escape, _LETTERS))})\][*+]"
_ALTERNATIVES = (
    r"'(s|t|re|ve|m|ll|d)",
    r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)",
    r" \?(\\p\{L\}|\\p\{N\})\+",
    r"\\p\{N\}(\+|\{1,3\})?",
    r" \?\[\^\\s\\p\{L\}\\p\{N\}\]\+(\[\\r\\n/?\]\*)?",
    rf"(\[\^\\r\\n\\p\{{L\}}\\p\{{N\}}\]\?)?(\\p\{{L\}}\+|({_CLASS})+){_SUFFIX}",
    r"\\s\*\[\\r\\n\]\+?",
    r"\\s\+\(\?!\\S\)",
    r"\\s\+",
)
"""Alternatives of the patterns of GPT-2, GPT-4 (cl100k, Qwen, Llama 3) and GPT-4o (o200k), themselves as patterns.

Each of them has a space between plain characters only as its first character, and none looks behind."""

_KNOWN = re.compile("|".join(f"(?:{alternative})" for alternative in _ALTERNATIVES))
_CROSSES = re.compile(r"[^\s\u2581\u0120][\s\u2581\u0120]")
_CROSSES_MARK = re.compile(r"[^\u2581]\u2581")


@dataclasses.dataclass(frozen=True)
class Borders:
    """Whether sequences may be cut.

    Attributes:
        reason: why not; None = they may.
        unsafe: strings with which a sequence may not.
    """

    reason: str | None = None
    unsafe: tuple[str, ...] = ()


def find_borders(data: JSON) -> Borders:
    """Return whether a tokenizer may be cut at single spaces.

    Args:
        data: content of tokenizer.json.

    Example:
        >>> parts = {"added_tokens": [], "normalizer": None, "model": {"type": "WordPiece", "vocab": {}}}
        >>> find_borders({**parts, "pre_tokenizer": {"type": "BertPreTokenizer"}})
        Borders(reason=None, unsafe=())
        >>> find_borders({**parts, "pre_tokenizer": {"type": "FixedLength", "length": 5}}).reason
        'WordPiece and pre-tokenizer FixedLength'
    """
    normalizers = list(_flat(data.get("normalizer"), "normalizers"))
    for step in normalizers:
        if not _is_local(step):
            return Borders(f"normalizer {step['type']}")
    added = data["added_tokens"]
    unsafe = [token["content"] for token in added if token.get("rstrip") or _CROSSES.search(token["content"])]
    if any(step["type"] == "Prepend" or step.get("strip_left") for step in normalizers):
        # What follows an added token is normalized as if a sequence began there.
        unsafe += [token["content"] for token in added]
    steps, model = list(_flat(data.get("pre_tokenizer"), "pretokenizers")), data["model"]
    if model.get("dropout"):
        return Borders("dropout of merges")
    if any(_splits(step, normalizers) for step in steps):
        if others := [step["type"] for step in steps if not _splits(step, normalizers) and step["type"] not in _LOCAL]:
            return Borders(f"pre-tokenizer {others[0]}")
    elif model["type"] == "BPE" and SPACE_MARK in model["vocab"] and _only_marks(normalizers, steps):
        unsafe += [
            SPACE_MARK,
            *(text.replace(SPACE_MARK, " ") for text in filter(_CROSSES_MARK.search, model["vocab"])),
        ]
    else:
        return Borders(" and ".join([model["type"], *(f"pre-tokenizer {step['type']}" for step in steps)]))
    unsafe = list(dict.fromkeys(unsafe))
    if len(unsafe) > CROSSING:
        return Borders(f"{len(unsafe)} tokens over the borders of words")
    return Borders(unsafe=tuple(unsafe))


def _flat(step: JSON | None, key: str) -> Iterator[JSON]:
    """Yield the steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step[key]:
        yield from _flat(inner, key)


def _is_local(step: JSON) -> bool:
    kind = step["type"]
    if kind != "Replace":
        return kind in _LOCAL_NORMALIZERS
    pattern = step["pattern"]
    if pattern in ({"String": " "}, {"Regex": " {2,}"}):
        return step["content"] in (" ", SPACE_MARK)
    text, content = pattern.get("String", " "), step["content"]
    return bool(content) and not re.search(r"[\s\u2581]", text + content)


def _splits(step: JSON, normalizers: Sequence[JSON]) -> bool:
    """Return whether a pre-tokenizer has an end of a piece at every border."""
    kind = step["type"]
    if kind == "ByteLevel":
        return bool(step.get("use_regex", True))
    if kind == "Metaspace":
        return bool(step.get("split", True)) and step["replacement"] == SPACE_MARK
    if kind == "CharDelimiterSplit":
        return bool(step["delimiter"] == " ")
    if kind != "Split":
        return kind in _SPLITTERS
    pattern = step["pattern"]
    if "Regex" in pattern:
        return step["behavior"] == "Isolated" and not step["invert"] and _is_known(pattern["Regex"])
    space = SPACE_MARK if _only_marks(normalizers, ()) else " "
    return pattern == {"String": space} and step["behavior"] in ("Removed", "Isolated", "MergedWithNext")


def _only_marks(normalizers: Sequence[JSON], steps: Sequence[JSON]) -> bool:
    """Return whether all that happens before the merges is that spaces are replaced by marks.

    Args:
        steps: pre-tokenizers. Gemma splits at spaces, of which the normalizer has left none.
    """
    marked = [step for step in normalizers if step["type"] != "Prepend"]
    if not marked:
        return [step["type"] for step in steps] == ["Metaspace"] and steps[0]["replacement"] == SPACE_MARK
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    splits = ("Split", {"String": " "})
    return marked == [replaces] and all((step["type"], step.get("pattern")) == splits for step in steps)


def _is_known(pattern: str) -> bool:
    """Return whether all alternatives of a pattern are known, and white space is always matched by one of them."""
    parts = [""]
    depth = 0
    for character in pattern:
        depth += (character in "([") - (character in ")]")
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return r"\s+" in parts and all(_KNOWN.fullmatch(part) for part in parts)
