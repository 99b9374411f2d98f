"""Write hf_sparse/kernels/csrc/gelu_table.h: the tail of the normal distribution in pieces, for the GELU of x86.

    python scripts/tools/make_gelu_table.py [--check]

In piece i, Phi(-a) is a polynomial in u = a * scale - i, -1/2 <= u <= 1/2, through Chebyshev points. One coefficient of
all pieces fits what one instruction looks up in: 32 pieces of degree 4 for AVX-512, 8 of degree 8 for AVX2.
Both are off by 4e-9 at most where a is small and by 2e-5 of itself where it is large. The last piece is zero: there,
GELU(x) is x to fp32.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

TARGET = Path(__file__).resolve().parents[2] / "hf_sparse" / "kernels" / "csrc" / "gelu_table.h"


class Form(NamedTuple):
    """Pieces, their degree, and pieces a unit: the last but one ends at 5.55, where Phi(-a) is 1.5e-8."""

    pieces: int
    degree: int
    scale: float


FORMS = {"64": Form(32, 4, 5.5), "32": Form(8, 8, 1.171875)}
"""By bytes of a register."""


def table(form: Form) -> np.ndarray:
    """Return the coefficients, by power and piece."""
    u = np.cos(np.pi * (np.arange(form.degree + 1) + 0.5) / (form.degree + 1)) / 2
    out = np.zeros((form.degree + 1, form.pieces))
    for piece in range(form.pieces - 1):
        tail = [math.erfc((piece + at) / form.scale / math.sqrt(2)) / 2 for at in u]
        out[:, piece] = np.linalg.solve(np.vander(u, increasing=True), tail)
    return out


def text() -> str:
    """Return the header."""
    lines = ["// Written by scripts/tools/make_gelu_table.py: do not edit.", "#pragma once", ""]
    for number, (width, form) in enumerate(FORMS.items()):
        lines.append(f"#{'elif' if number else 'if'} HF_SPARSE_BYTES == {width}")
        lines.append(f"constexpr int kGeluDegree = {form.degree};")
        lines.append(f"constexpr float kGeluScale = {form.scale}f;")
        lines.append(f"alignas(64) constexpr float kGeluTail[kGeluDegree + 1][{form.pieces}] = {{")
        for row in table(form).astype(np.float32):
            values = [f"{value:.9e}f" if value else "0.0f" for value in row]
            packed = ",\n     ".join(", ".join(values[i : i + 6]) for i in range(0, form.pieces, 6))
            lines.append(f"    {{{packed}}},")
        lines.append("};")
    return "\n".join([*lines, "#endif", ""])


def agrees(header: str) -> bool:
    """Compare a header with what would be written: the same lines, and values to rounding.

    The last bits of the solution depend on the processor that computes it; the header in the repository is the table.
    """
    number = re.compile(r"-?\d\.\d+e[+-]\d+")
    if number.sub("#", header) != number.sub("#", text()):
        return False
    values, expected = (np.array([float(value) for value in number.findall(t)]) for t in (header, text()))
    return bool(np.allclose(values, expected, rtol=1e-5, atol=1e-12))


def main() -> int:
    """Write the header, or check the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the file differs")
    if parser.parse_args().check:
        return int(not agrees(TARGET.read_text(encoding="utf-8")))
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
