"""Markdown from untrusted text, which must not become tables, links or HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .text import printable


def plain(text: object) -> str:
    r"""Return text in one line, escaped for Markdown and HTML, without control characters.

    Example:
        >>> plain("a|b <script>")
        'a\\|b &lt;script&gt;'
    """
    line = printable(" ".join(str(text).split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", line)


def fenced(text: str, language: str = "") -> str:
    """Return a block of code, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells are Markdown; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
