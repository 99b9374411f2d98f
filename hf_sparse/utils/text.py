"""Values, names and sizes as text of a bounded length that a terminal can show."""

from __future__ import annotations

import reprlib

from ..errors import printable

__all__ = ["format_bytes", "kind_of_name", "printable", "shorten"]

_MAX_BITS = 256


class _Repr(reprlib.Repr):
    """`repr` that takes bounded time for nested containers and long integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 16
        self.maxstring = self.maxlong = self.maxother = max(width, 8)

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of more than 4300 digits, and takes quadratic time for fewer.
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > _MAX_BITS else repr(x)


def shorten(value: object, width: int = 80) -> str:
    """Return the `repr` of a value for a message, cut to a width. The time is bounded too, whatever the value.

    Example:
        >>> shorten("2:4"), shorten(list(range(9)), width=12), shorten(10**5000)
        ("'2:4'", '[0, 1, 2,...', 'an integer of 16610 bits')
    """
    text = printable(_Repr(width).repr(value))
    return text if len(text) <= width else text[: width - 3] + "..."


def format_bytes(count: int) -> str:
    """Return a number of bytes in kB or MB.

    Example:
        >>> format_bytes(1500), format_bytes(67_000_000)
        ('1.5 kB', '67.00 MB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def kind_of_name(name: str) -> str:
    """Return the name of a module or tensor with its numbers replaced by `*`: the same for all layers.

    Example:
        >>> kind_of_name("encoder.layer.11.output.dense.weight")
        'encoder.layer.*.output.dense.weight'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
