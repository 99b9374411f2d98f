"""A hash table as a codec beside those of the format: stored bits for each nonzero, and whether decoding is exact.

    python scripts/benchmarks/bench_hash_codec.py [--rows 768] [--columns 3072] [--output FILE]

The table is a quotient filter that is exact (Bender et al. 2012, with the whole remainder, after an invertible hash of
the position): m slots of a remainder and three flags each, filled to 95 % at most. A membership test reads a few slots;
the other codecs have to be decoded. No exact store of a random mask goes below its entropy.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_sparse.formats.codecs import decode, encode
from hf_sparse.formats.codecs.base import Array
from hf_sparse.utils.atomic_io import write_text

FULL = 0.95
CODECS = ("bitmask", "deflate", "csr", "gap")


def _multiplier(modulus: int) -> tuple[int, int]:
    """Return a number near the golden section of a modulus, without common factors, and its inverse."""
    factor = int(modulus * 0.6180339887) | 1
    while math.gcd(factor, modulus) != 1:
        factor += 2
    return factor, pow(factor, -1, modulus)


class HashTable:
    """Positions in a quotient filter.

    Args:
        positions: ascending.
        total: one more than the largest that can be.
    """

    def __init__(self, positions: Array, total: int) -> None:
        least = max(1, math.ceil(len(positions) / FULL))
        self.bits = max(0, int(math.log2(total / least)))
        self.slots = -(-total >> self.bits) if total % (1 << self.bits) else total >> self.bits
        self.modulus = self.slots << self.bits
        factor, self.inverse = _multiplier(self.modulus)
        hashed = np.sort(np.array([int(p) * factor % self.modulus for p in positions], dtype=np.int64))
        quotient, remainder = hashed >> self.bits, hashed & ((1 << self.bits) - 1)
        # Linear probing: each goes to its slot or behind the one before it; what is left over lies behind the end.
        order = np.arange(len(hashed))
        place = np.maximum.accumulate(quotient - order) + order
        size = max(self.slots, int(place[-1]) + 1)
        self.remainders = np.zeros(size, dtype=np.int64)
        self.occupied, self.continued, self.shifted = (np.zeros(size, dtype=bool) for _ in range(3))
        self.remainders[place] = remainder
        self.occupied[quotient] = True
        self.continued[place[1:]] = quotient[1:] == quotient[:-1]
        self.shifted[place] = place != quotient

    @property
    def stored_bits(self) -> int:
        """Size of remainders and flags."""
        return len(self.remainders) * (self.bits + 3)

    def positions(self) -> Array:
        """Return the positions again, from remainders and flags alone."""
        used = self.occupied | self.continued | self.shifted
        # A slot whose quotient occurs is never empty: its own entry, or one before it, was put there.
        begins = used & ~self.continued
        quotients = np.flatnonzero(self.occupied)
        run = np.cumsum(begins)[used] - 1
        hashed = (quotients[run] << self.bits) | self.remainders[used]
        return np.sort(np.array([int(h) * self.inverse % self.modulus for h in hashed], dtype=np.int64))


def main() -> None:
    """Print the table and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    written: list[dict[str, Any]] = []
    total = options.rows * options.columns
    print(f"{options.rows} x {options.columns}, random masks: bits for each nonzero beside its value")
    print(f"| zeros | entropy | hash table | {' | '.join(CODECS)} | smallest |")
    print("|---" * (4 + len(CODECS)) + "|")
    generator = np.random.default_rng(0)
    for zeros in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        count = round(total * (1 - zeros))
        chosen = np.sort(generator.choice(total, count, replace=False))
        weight = torch.zeros(total, dtype=torch.float32)
        weight[torch.from_numpy(chosen)] = 1.0
        weight = weight.view(options.rows, options.columns)
        table = HashTable(chosen, total)
        assert np.array_equal(table.positions(), chosen)
        found = {"hash table": table.stored_bits / count}
        for codec in CODECS:
            entry, parts = encode(weight, codec)
            found[codec] = 8 * sum(part.nbytes for suffix, part in parts.items() if suffix) / count
            assert torch.equal(decode(entry, parts), weight)
        density = count / total
        entropy = -(density * math.log2(density) + zeros * math.log2(zeros)) / density
        best = min(found, key=lambda name: found[name])
        cells = " | ".join(f"{value:.2f}" for value in found.values())
        print(f"| {100 * zeros:g} % | {entropy:.2f} | {cells} | {best} |", flush=True)
        written.append({"zeros": zeros, "entropy": entropy, **found})
    if options.output:
        what = "bits for each nonzero beside its value, random mask (seed 0)"
        result = {"metric": what, "shape": [options.rows, options.columns], "rows": written}
        write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
