"""What a page of a report must not hold: scripts, requests, tags left open, ids given twice."""

from __future__ import annotations

import re
from html.parser import HTMLParser

EVIL = '<script>alert("x")</script>'
"""A name that an untrusted file may hold."""

VOID = ("meta", "img", "wbr")


class _Checked(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.references: set[str] = set()
        self.feed(text)
        assert not self.open
        assert self.references <= self.ids

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "form", "a", "foreignobject", "animate", "set")
        for name, value in attrs:
            assert not name.startswith("on")
            assert value is not None
            if name == "id":
                assert value not in self.ids, f"id {value} is given twice"
                self.ids.add(value)
            if name in ("src", "href"):
                assert re.match(r"data:image/png;base64,[A-Za-z0-9+/=]+$|#", value), value
            self.references |= {one or other for one, other in re.findall(r"^#(.+)|url\(#(.+?)\)", value)}
            assert "url(" not in value.replace("url(#", "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    """Fail on whatever runs or fetches something, and on tags that are not closed."""
    _Checked(text)
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
