"""What storing a sparse model costs: bytes against the entropy bound, and time against plain dense files.

    python scripts/benchmarks/bench_storage.py                     # all of it, some minutes
    python scripts/benchmarks/bench_storage.py --layers 2 size     # one part, fewer layers
    python scripts/benchmarks/bench_storage.py --compressed-tensors-python /somewhere/legacy/bin/python size

The last one measures files that compressed-tensors itself writes, in an environment as described in
scripts/tools/make_compressed_tensors_fixture.py; without it their size is computed from their layout.

The weights have the shapes of the encoder layers of BERT-base, are random, and are zeroed by a random mask of the given
kind. Times are ratios of two interleaved operations, so that other load on the machine affects both; quoted is the
median with its quartiles. One thread.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file as save_dense
from torch import Tensor

from hf_sparse.formats.codecs import decode, encode
from hf_sparse.formats.manifest import TensorEntry
from hf_sparse.formats.safetensors_io import save_file
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave, quartiles, ratios

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.97)
SMALLEST = {"90 %": 0.118}
DECODED, ENCODED, LOADED = 0.7, 3.0, 1.3
LIMITS = {"50 %": 0.563, "80 %": 0.25, "90 %": 0.135, "95 %": 0.075, "97 %": 0.048, "2:4": 0.563, "32x32 75 %": 0.252}


def entropy(density: float) -> float:
    """Return the bits that one entry of a random mask is worth."""
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p)


def unstructured(sparsity: float) -> Callable[[int, int], Tensor]:
    """Return a maker of masks with exactly this sparsity."""

    def make(rows: int, cols: int) -> Tensor:
        mask = torch.ones(rows * cols, dtype=torch.bool)
        mask[torch.randperm(rows * cols)[: round(sparsity * rows * cols)]] = False
        return mask.view(rows, cols)

    return make


def two_of_four(rows: int, cols: int) -> Tensor:
    """Keep two of every four."""
    return (torch.rand(rows, cols // 4, 4).argsort(-1) < 2).view(rows, cols)


def blocks(rows: int, cols: int) -> Tensor:
    """Keep a quarter of the blocks of 32 x 32."""
    kept = unstructured(0.75)(rows // 32, cols // 32)
    return kept.repeat_interleave(32, 0).repeat_interleave(32, 1)


KINDS: dict[str, tuple[Callable[[int, int], Tensor], float, float]] = {
    **{f"{s:.0%}".replace("%", " %"): (unstructured(s), 1 - s, entropy(1 - s)) for s in SPARSITIES},
    "2:4": (two_of_four, 0.5, math.log2(6) / 4),
    "32x32 75 %": (blocks, 0.25, entropy(0.25) / 1024),
}
"""Kind of mask -> maker, fraction kept, entropy of the mask in bits per weight."""


def weights(kind: str, layers: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random weights of encoder layers, with zeros of one kind."""
    torch.manual_seed(0)
    make = KINDS[kind][0]
    return {
        f"encoder.layer.{layer}.{number}.weight": torch.where(make(*shape), torch.randn(shape) * 0.04, 0.0).to(dtype)
        for layer in range(layers)
        for number, shape in enumerate(SHAPES)
    }


def timed(
    actions: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Return the seconds of each action in each round, interleaved."""
    runs = {str(number): action for number, action in enumerate(actions)}
    return list(interleave(runs, rounds, warmup=1, clock=clock, inference=False).values())


def spread(values: list[float]) -> str:
    """Return the median and the quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:6.3f} [{low:.3f}, {high:.3f}]"


def against(value: float, limit: float, at_least: bool = False) -> str:
    """Return whether a limit is kept."""
    kept = value >= limit if at_least else value <= limit
    return f"{'kept' if kept else 'MISSED'} ({'>=' if at_least else '<='} {limit})"


def size(args: argparse.Namespace, folder: Path) -> None:
    """Print the size of each kind, with what others need."""
    print("Size, fp16, fraction of the dense bytes (whole file, header included)")
    print(f"{'mask':<12}{'limit':>8}{'bound':>8}{'ours':>8}{'smallest':>10}{'c-t 0.14':>10}{'zstd':>8}   codecs")
    for kind, (_, kept, bits) in KINDS.items():
        tensors = weights(kind, args.layers, torch.float16)
        dense = sum(tensor.nbytes for tensor in tensors.values())
        manifest = save_file(tensors, folder / "auto")
        save_file(tensors, folder / "smallest", codec="smallest")
        save_dense(tensors, folder / "dense")
        ours, smallest = ((folder / name).stat().st_size / dense for name in ("auto", "smallest"))
        theirs = compressed_tensors(kind, tensors, args.compressed_tensors_python, folder)
        others = f"{theirs / dense:>10.4f}{zstd(folder / 'dense') / dense:>8.4f}"
        used = " ".join(sorted({entry.codec for entry in manifest.tensors.values()}))
        verdict = against(ours, LIMITS[kind])
        if kind in SMALLEST:
            verdict += f", smallest {against(smallest, SMALLEST[kind])}"
        print(f"{kind:<12}{LIMITS[kind]:>8.3f}{kept + bits / 16:>8.4f}{ours:>8.4f}{smallest:>10.4f}{others}   ", end="")
        print(f"{used:<14}{verdict}")
    print("bound: entropy of the mask, and the values plain. smallest: codec='smallest' codes the values too.")
    how = "computed from its layout" if args.compressed_tensors_python is None else "files that it wrote itself"
    print(f"c-t 0.14: compressed-tensors' sparse-bitmask, for 2:4 sparse-24-bitmask, {how}. zstd: level 3.\n")


WRITE_COMPRESSED = """
import sys
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import load_file, save_file
config = Sparse24BitMaskConfig() if sys.argv[1] == "2:4" else BitmaskConfig()
save_file(BaseCompressor.load_from_registry(config.format, config=config).compress(load_file(sys.argv[2])), sys.argv[3])
"""


def compressed_tensors(kind: str, tensors: dict[str, Tensor], python: str | None, folder: Path) -> int:
    """Return what compressed-tensors 0.14 writes: values, a bitmask in whole bytes per row, row offsets, the shape."""
    if python is not None:
        command = [python, "-c", WRITE_COMPRESSED, kind, str(folder / "dense"), str(folder / "theirs")]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return (folder / "theirs").stat().st_size
    total = 0
    for tensor in tensors.values():
        rows, cols = tensor.shape
        offsets = 0 if kind == "2:4" else 8 * rows
        total += int(tensor.count_nonzero()) * tensor.element_size() + rows * -(-cols // 8) + offsets + 16
    return total


def zstd(path: Path) -> float:
    """Return the bytes of the file after the zstd program, or NaN where there is none."""
    program = shutil.which("zstd")
    if program is None:
        return math.nan
    return len(subprocess.run([program, "-3", "-c", "-q", path], check=True, capture_output=True).stdout)


def decoding(args: argparse.Namespace, folder: Path) -> None:
    """Print the speed of decoding, checksums verified."""
    print(f"Decoding with checksum, GB of dense weights per second of one core (limit: {DECODED} for fp32)")

    def decode_all(packed: list[tuple[TensorEntry, dict[str, Tensor]]]) -> None:
        for entry, parts in packed:
            decode(entry, parts)

    for dtype in (torch.float32, torch.float16):
        for kind in KINDS:
            tensors = weights(kind, 1, dtype).values()
            gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
            profiles = [[encode(tensor, codec) for tensor in tensors] for codec in ("auto", "smallest")]
            times = timed([partial(decode_all, packed) for packed in profiles], args.rounds, time.process_time)
            speeds = [[gigabytes / seconds for seconds in column] for column in times]
            ours, smallest = map(spread, speeds)
            used = " ".join(sorted({entry.codec for entry, _ in profiles[0]}))
            verdict = against(statistics.median(speeds[0]), DECODED, at_least=True) if dtype is torch.float32 else ""
            print(f"{named(dtype):<9}{kind:<12}{ours}  smallest {smallest}   {used:<14}{verdict}")
    print()


def encoding(args: argparse.Namespace, folder: Path) -> None:
    """Print the time of packing and writing against that of writing dense: the encoder alone, and a whole model."""
    print(f"Encode and write, times a dense save (limit: {ENCODED:.0f}). A packed file is forced to the disk, too")
    print("Weights of the encoder, against save_file of safetensors")
    for dtype in (torch.float32, torch.float16):
        for kind in KINDS:
            tensors = weights(kind, args.layers, dtype)
            actions = [partial(save_dense, tensors, folder / "dense"), partial(save_file, tensors, folder / "packed")]
            print(f"{named(dtype):<9}{kind:<12}{ratio(timed(actions, args.rounds), ENCODED)}")
    print("Whole model, save_pretrained, packed against that of a model that was never sparse")
    for dtype in (torch.float32, torch.float16):
        plain, sparse = bert(args.layers, dtype), pruned(bert(args.layers, dtype))
        for profile in ("packed", "smallest"):
            actions = [
                partial(plain.save_pretrained, folder / "plain-model"),
                partial(sparse.save_pretrained, folder / "saved-model", format=profile),
            ]
            print(f"{named(dtype):<9}90 % {profile:<9}{ratio(timed(actions, args.rounds), ENCODED)}")
    print()


def named(dtype: torch.dtype) -> str:
    """Return the name of a type."""
    return str(dtype).removeprefix("torch.")


def ratio(times: Sequence[list[float]], limit: float) -> str:
    """Return how many times as long the second of two took, its spread, the limit, and the seconds."""
    first, second = times
    factors = ratios({"first": first, "second": second}, "second", "first")
    seconds = f"seconds {spread(first)} and {spread(second)}"
    return f"{spread(factors)}   {against(statistics.median(factors), limit):<16} {seconds}"


def bert(layers: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a BERT-base with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_config(transformers.BertConfig(num_hidden_layers=layers), dtype=dtype)


def pruned(model: Any) -> Any:
    """Return the model at 90 % zeros."""
    from hf_sparse import SparsityConfig, sparsify

    return sparsify(model, SparsityConfig(sparsity=0.9, schedule="constant"))


def loading(args: argparse.Namespace, folder: Path) -> None:
    """Print the time of `from_pretrained` of a packed model against the dense one, from a warm and a cold cache."""
    model = bert(args.layers)
    load = type(model).from_pretrained
    model = pruned(model)
    for profile in PROFILES:
        model.save_pretrained(folder / "models" / profile, format=profile)
    del model

    def load_and_read(path: Path) -> None:
        for parameter in load(path).parameters():
            parameter.sum()

    print("from_pretrained of a packed BERT at 90 %, float32, times that of the dense one")
    print("(transformers only maps a dense file: its bytes are read at first use. So also: until all have been read)")
    for cache, limit in (("warm", LOADED), ("cold", 1.0)):
        for what, action in (("loaded", load), ("loaded and read", load_and_read)):
            actions = [partial(with_cache, cache, action, folder / "models" / profile) for profile in PROFILES]
            columns = timed(actions, args.rounds, LOADING.read)
            for profile, column in zip(PROFILES[1:], columns[1:], strict=True):
                print(f"{cache:<5}{what:<16}{profile:<9}{ratio([columns[0], column], limit)}")
    print("Pages of the files in memory, warm and after dropping (0 % is cold; a disk may have a cache of its own)")
    for profile in PROFILES:
        path = folder / "models" / profile
        warm = share_in_memory(path)
        drop(path)
        print(f"     {'':<16}{profile:<9}{warm:6.1%} and {share_in_memory(path):.1%}")
    print()


PROFILES = ("dense", "packed", "smallest")


class Stopwatch:
    """A clock that stands still while a cache is made cold or warm."""

    def __init__(self) -> None:
        self._spent = 0.0

    def read(self) -> float:
        """Return the seconds that were measured so far."""
        return self._spent

    def measure(self, action: Callable[[], object]) -> None:
        """Run something with the clock on."""
        start = time.perf_counter()
        action()
        self._spent += time.perf_counter() - start


LOADING = Stopwatch()


def with_cache(cache: str, action: Callable[[Path], object], path: Path) -> None:
    """Make the cache cold, or warm, and measure the action."""
    gc.collect()  # a model that still lives would keep its file mapped
    if cache == "cold":
        drop(path)
    else:
        for file in path.glob("*.safetensors"):
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
    LOADING.measure(partial(action, path))


def drop(path: Path) -> None:
    """Drop the pages of a model's files from the cache of the system."""
    for file in path.glob("*.safetensors"):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_memory(path: Path) -> float:
    """Return which share of the pages of a model's files is in the cache of the system."""
    pages = bytearray()
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
            found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            view = ctypes.c_char.from_buffer(mapped)
            code = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(view)), len(mapped), found)
            del view
            if code:
                return math.nan
            pages += bytes(page & 1 for page in found)
    return sum(pages) / len(pages)


PARTS = {"size": size, "decoding": decoding, "encoding": encoding, "loading": loading}


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compressed-tensors-python", metavar="PYTHON", help="one that can import version 0.14 of it")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts or PARTS:
            PARTS[part](args, Path(folder))


if __name__ == "__main__":
    main()
