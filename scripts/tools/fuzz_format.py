"""Corrupt files of every codec in many ways: loading must return exactly the right tensors, or raise CheckpointError.

    python scripts/tools/fuzz_format.py --count 100000

Anything else is a violation: another exception, a wrong tensor, a crash, more than ten seconds, or memory out of
proportion. Each file holds one tensor packed by one codec and a dense one. Raw bytes, the header, the manifest, and
header and data together (so that they still agree) are corrupted. The exit status is 1 if there is a violation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file as save_plain
from torch import Tensor

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.codecs import CODECS, DTYPE_NAMES, Source, encode, pack
from hf_sparse.formats.codecs.base import as_bytes
from hf_sparse.formats.manifest import ITEM_BYTES, Manifest
from hf_sparse.formats.safetensors_io import MANIFEST_KEY, load_file

SPECS: list[Any] = ["dense", "bitmask", "deflate", "csr", "gap", "planes", "2:4", "1:5"]
SPECS += [{"name": name, "rows": 4, "cols": 3} for name in ("block", "gap", "planes")]
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I8", "BOOL")
SECONDS = 10
GROWTH = 256 * 1024
"""Kilobytes that the process may grow by: the files are of some kilobytes, and ratios are bounded."""

Corruption = Callable[["Original", random.Random], bytes]


class Original:
    """An intact file and what it holds."""

    def __init__(self, spec: Any, dtype: str, folder: Path) -> None:
        torch.manual_seed(0)
        weight = torch.zeros(8, 5, 10, dtype=torch.uint8)
        weight[..., 1::5] = torch.randint(1, 255, (8, 5, 2)) * (torch.rand(8, 5, 2) < 0.7)
        kind = {name: torch_dtype for torch_dtype, name in DTYPE_NAMES.items()}[dtype]
        cast = weight.bool() if dtype == "BOOL" else weight.to(kind)
        self.tensors = {"w": cast, "b": torch.randn(7)}
        entry, parts = pack(Source(cast), CODECS.build(spec))
        plain, dense = encode(self.tensors["b"], "dense")
        stored = {"w" + suffix: part for suffix, part in parts.items()} | {"b": dense[""]}
        manifest = Manifest({"w": entry, "b": plain}, targets=("w",))
        save_plain(stored, folder / "original", metadata={MANIFEST_KEY: manifest.to_json()})
        self.bytes = (folder / "original").read_bytes()
        size = int.from_bytes(self.bytes[:8], "little")
        self.header: dict[str, Any] = json.loads(self.bytes[8 : 8 + size])
        self.data = self.bytes[8 + size :]
        self.name = f"{CODECS.build(spec)} {dtype}"

    def is_right(self, tensors: dict[str, Tensor]) -> bool:
        """Return whether these are the tensors that were saved, to the bit."""
        return set(tensors) == set(self.tensors) and all(
            (tensors[key].dtype, tensors[key].shape) == (tensor.dtype, tensor.shape)
            and bool(np.array_equal(as_bytes(tensors[key]), as_bytes(tensor)))
            for key, tensor in self.tensors.items()
        )


def assembled(header: dict[str, Any], data: bytes) -> bytes:
    """Return a file."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flip(data: bytes, dice: random.Random) -> bytes:
    """Change some bytes or bits."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 30))):
        if out:
            place = dice.randrange(len(out))
            out[place] = dice.choice((out[place] ^ 1 << dice.randrange(8), dice.randrange(256), 0, 255))
    return bytes(out)


def cut(data: bytes, dice: random.Random) -> bytes:
    """Remove, repeat, insert or move a piece."""
    start = dice.randrange(len(data) + 1)
    end = min(len(data), start + dice.choice((1, 2, 8, 64, len(data))))
    piece = data[start:end]
    return dice.choice(
        (
            data[:start] + data[end:],
            data[:end] + piece + data[end:],
            data[:start] + dice.randbytes(len(piece)) + data[start:],
            data[:start],
            data[end:] + data[:end],
        )
    )


def odd_value(value: Any, dice: random.Random) -> Any:
    """Return something to stand for a value of JSON."""
    whole = value if isinstance(value, int) else 1
    return dice.choice(
        (
            whole + 1,
            whole - 1,
            whole * 2,
            whole // 2,
            0,
            -1,
            2**31,
            2**32 + whole,
            2**53,
            2**63 - 1,
            2**63,
            2**64,
            10**400,
        )
        + (1.0, 1e308, True, None, "", "../../../etc/passwd", [], {}, [[]], [whole] * 40, "w", "b", "w_mask", "\ud800")
        + tuple(CODECS)
        + tuple(ITEM_BYTES)
    )


def twist(node: Any, dice: random.Random) -> None:
    """Change one place of a JSON tree."""
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = dice.choice(keys)
        if isinstance(node[key], (dict, list)) and dice.random() < 0.85:
            node = node[key]
            continue
        action = dice.randrange(6)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[dice.choice((key + "_mask", "extra", "options", "edits", key.upper()))] = node.pop(key)
        elif action == 2:
            node[key] = copy.deepcopy(node[dice.choice(keys)])
        else:
            node[key] = odd_value(node[key], dice)
        return


def bytes_anywhere(original: Original, dice: random.Random) -> bytes:
    """Flip bytes of the whole file."""
    return flip(original.bytes, dice)


def pieces_anywhere(original: Original, dice: random.Random) -> bytes:
    """Cut the whole file."""
    return cut(original.bytes, dice)


def bytes_of_tensors(original: Original, dice: random.Random) -> bytes:
    """Flip bytes behind the header."""
    return assembled(original.header, flip(original.data, dice))


def values_of_the_manifest(original: Original, dice: random.Random) -> bytes:
    """Change one or two values or keys of the manifest."""
    header = copy.deepcopy(original.header)
    manifest = json.loads(header["__metadata__"][MANIFEST_KEY])
    for _ in range(dice.choice((1, 1, 2))):
        twist(manifest, dice)
    header["__metadata__"][MANIFEST_KEY] = json.dumps(manifest)
    return assembled(header, original.data)


def text_of_the_manifest(original: Original, dice: random.Random) -> bytes:
    """Flip or cut characters of the manifest."""
    header = copy.deepcopy(original.header)
    text = header["__metadata__"][MANIFEST_KEY].encode()
    header["__metadata__"][MANIFEST_KEY] = dice.choice((flip, cut))(text, dice).decode("latin-1")
    return assembled(header, original.data)


def values_of_the_header(original: Original, dice: random.Random) -> bytes:
    """Change values or keys of the header itself."""
    header = copy.deepcopy(original.header)
    twist(header, dice)
    return assembled(header, original.data)


def sizes_that_agree(original: Original, dice: random.Random) -> bytes:
    """Make one part longer or shorter, in the header, the data and some number of the manifest alike."""
    header = copy.deepcopy(original.header)
    manifest = json.loads(header["__metadata__"][MANIFEST_KEY])
    parts = {key: original.data[slice(*info["data_offsets"])] for key, info in header.items() if key != "__metadata__"}
    key = dice.choice([key for key in parts if len(header[key]["shape"]) == 1])
    width = ITEM_BYTES[header[key]["dtype"]]
    length = max(0, header[key]["shape"][0] + dice.choice((-8, -2, -1, 1, 2, 8, 100)))
    parts[key] = (parts[key] + dice.randbytes(1000 * width))[: length * width]
    header[key]["shape"] = [length]
    entry = manifest["tensors"]["w"]
    if entry.get("options") and dice.random() < 0.7:
        entry["options"][dice.choice(list(entry["options"]))] = dice.choice((length, length - 1, length + 1))
    if dice.random() < 0.5:
        entry["nonzeros"] = length
    if dice.random() < 0.3:
        entry["shape"] = dice.choice(([length, 1], [1, length], [length, 8], [8, length], entry["shape"][::-1]))
    header["__metadata__"][MANIFEST_KEY] = json.dumps(manifest)
    end, data = 0, b""
    for name, part in parts.items():
        header[name]["data_offsets"] = [end, end + len(part)]
        data, end = data + part, end + len(part)
    return assembled(header, data)


CORRUPTIONS: tuple[Corruption, ...] = (
    bytes_anywhere,
    pieces_anywhere,
    bytes_of_tensors,
    values_of_the_manifest,
    text_of_the_manifest,
    values_of_the_header,
    sizes_that_agree,
)


def outcome(original: Original, path: Path) -> str:
    """Return "right", "refused", or the violation."""
    try:
        return "right" if original.is_right(load_file(path)) else "violation: other tensors than were saved"
    except CheckpointError:
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  a panic of a library is not an Exception, and is a violation too
        return f"violation: {type(error).__name__}: {str(error)[:200]}"


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"timed out after {SECONDS} seconds")


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, _too_slow)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fuzz(count: int, seed: int, keep: Path | None = None) -> Counter[tuple[str, str]]:
    """Corrupt and load `count` files; return how often each corruption had each outcome."""
    dice = random.Random(seed)  # noqa: S311  repeatable, not secret
    found: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name, _alarm():
        folder = Path(name)
        originals = [Original(spec, dtype, folder) for spec in SPECS for dtype in DTYPES]
        for original in originals:
            (folder / "intact").write_bytes(original.bytes)
            found["nothing", outcome(original, folder / "intact")] += 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            original, corruption = originals[number % len(originals)], dice.choice(CORRUPTIONS)
            data = corruption(original, dice)
            (folder / "corrupted").write_bytes(data)
            signal.alarm(SECONDS)
            result = outcome(original, folder / "corrupted")
            signal.alarm(0)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if after - before > GROWTH:
                result = f"violation: {original.name} took {(after - before) // 1024} MB more"
                before = after
            if result.startswith("violation"):
                print(f"file {number}, {original.name}, {corruption.__name__}: {result}", file=sys.stderr)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{number}.safetensors").write_bytes(data)
            found[corruption.__name__, result.partition(":")[0]] += 1
    return found


def main() -> None:
    """Fuzz and print the table of outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that were violations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = fuzz(args.count, args.seed, args.keep)
    print(f"{'corruption of':<24}{'files':>9}{'refused':>9}{'right':>9}{'violations':>12}")
    for corruption in ("nothing", *(corruption.__name__ for corruption in CORRUPTIONS), "all"):
        results = {
            result: sum(times for (one, end), times in found.items() if end == result and corruption in (one, "all"))
            for result in ("refused", "right", "violation")
        }
        print(
            f"{corruption.replace('_', ' '):<24}{sum(results.values()):>9}{results['refused']:>9}{results['right']:>9}"
            f"{results['violation']:>12}"
        )
    seconds = time.perf_counter() - start
    print(f"{len(SPECS)} codecs and variants x {len(DTYPES)} types, seed {args.seed}, {seconds:.0f} s")
    if any(result == "violation" for _, result in found) or ("nothing", "refused") in found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
