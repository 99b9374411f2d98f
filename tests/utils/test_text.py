"""Values in messages take bounded time and space, and cannot command a terminal."""

import pytest

from hf_sparse.errors import CheckpointError, SparsityError
from hf_sparse.utils.text import format_bytes, kind_of_name, printable, shorten
from tests.helpers.limits import limited


def bomb():
    value: object = "lol"
    for _ in range(40):
        value = [value] * 10
    return shorten(value)


def test_shorten_takes_bounded_time_for_a_value_that_stands_for_more_than_there_is_memory():
    assert len(limited(bomb, seconds=5, megabytes=100)) <= 80


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("2:4", "'2:4'"),
        (None, "None"),
        (0.25, "0.25"),
        ({"a": [1, (2, 3)]}, "{'a': [1, (2, 3)]}"),
        (10**5000, "an integer of 16610 bits"),
        (-(2**70), "-1180591620717411303424"),
        ([10**5000], "[an integer of 16610 bits]"),
        ("\x1b[2J", r"'\x1b[2J'"),
        ("\u202e", r"'\u202e'"),
    ],
    ids=lambda value: "value",
)
def test_shorten_shows_short_values_as_they_are(value, text):
    assert shorten(value) == text


@pytest.mark.parametrize("value", ["x" * 1000, ["x" * 1000] * 50, dict.fromkeys(range(1000))])
def test_shorten_cuts_long_values(value):
    text = shorten(value)
    assert len(text) <= 80
    assert "..." in text


def test_printable_escapes_what_moves_the_cursor_and_keeps_lines():
    assert printable("a\x1b]0;x\x07\r\x9b\x7f\u2066\ud800") == r"a\x1b]0;x\x07\r\x9b\x7f\u2066\ud800"
    assert printable("Größe\t数\nß") == "Größe\t数\nß"


def test_every_error_of_ours_is_printable():
    assert str(CheckpointError("tensor '\x1b[31mw'")) == r"tensor '\x1b[31mw'"
    assert str(SparsityError()) == ""


def test_format_bytes_changes_unit_at_a_tenth_of_a_megabyte():
    assert [format_bytes(count) for count in (0, 99_999, 100_000, 10**9)] == [
        "0.0 kB",
        "100.0 kB",
        "0.10 MB",
        "1000.00 MB",
    ]


def test_kind_of_name_replaces_whole_parts_alone():
    assert kind_of_name("h.0.attn2.10.weight") == "h.*.attn2.*.weight"
