"""What storing a sparse model costs: bytes against the entropy bound, and time against plain dense files.

    python scripts/bench_storage.py                     # all of it, some minutes
    python scripts/bench_storage.py --layers 2 size     # one part, fewer layers

The weights have the shapes of the encoder layers of BERT-base, are random, and are zeroed by a random mask of the given
kind. Times are ratios of two things done in turns, so that whatever else the machine does falls on both; quoted is the
median with its quartiles. One thread.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file as save_dense
from torch import Tensor

from hf_sparse.codecs import decode, encode
from hf_sparse.files import save_file
from hf_sparse.manifest import TensorEntry

SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.97)
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


def in_turns(
    actions: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Return the seconds of each action in each round; the order turns from round to round."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(-1, rounds):  # the first round warms up
        order = list(enumerate(actions))
        for place, action in order if turn % 2 else order[::-1]:
            start = clock()
            action()
            if turn >= 0:
                times[place].append(clock() - start)
    return times


def spread(values: list[float]) -> str:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.3f} [{low:.3f}, {high:.3f}]"


def size(layers: int, rounds: int, folder: Path) -> None:
    """Print the size of each kind, with what others need."""
    print("Size, fp16, fraction of the dense bytes (whole file, header included)")
    print(f"{'mask':<12}{'limit':>8}{'bound':>8}{'ours':>8}{'smallest':>10}{'c-t 0.14':>10}{'zstd':>8}   codecs")
    for kind, (_, kept, bits) in KINDS.items():
        tensors = weights(kind, layers, torch.float16)
        dense = sum(tensor.nbytes for tensor in tensors.values())
        manifest = save_file(tensors, folder / "auto")
        save_file(tensors, folder / "smallest", codec="smallest")
        save_dense(tensors, folder / "dense")
        ours, smallest = ((folder / name).stat().st_size / dense for name in ("auto", "smallest"))
        others = f"{compressed_tensors(kind, tensors) / dense:>10.4f}{zstd(folder / 'dense') / dense:>8.4f}"
        used = " ".join(sorted({entry.codec for entry in manifest.tensors.values()}))
        print(f"{kind:<12}{LIMITS[kind]:>8.3f}{kept + bits / 16:>8.4f}{ours:>8.4f}{smallest:>10.4f}{others}   {used}")
    print("bound: entropy of the mask, and the values plain. smallest: codec='smallest' codes the values too.")
    print("c-t 0.14: computed from the layouts of compressed-tensors' sparse-bitmask and sparse-24-bitmask.\n")


def compressed_tensors(kind: str, tensors: dict[str, Tensor]) -> int:
    """Return what compressed-tensors 0.14 writes: values, a bitmask in whole bytes per row, row offsets, the shape."""
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


def decoding(layers: int, rounds: int, folder: Path) -> None:
    """Print the speed of decoding, checksums verified."""
    print("Decoding with checksum, GB of dense weights per second of one core (limit: 0.7 for fp32)")

    def decode_all(packed: list[tuple[TensorEntry, dict[str, Tensor]]]) -> None:
        for entry, parts in packed:
            decode(entry, parts)

    for dtype in (torch.float32, torch.float16):
        for kind in KINDS:
            tensors = weights(kind, 1, dtype).values()
            gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
            profiles = [[encode(tensor, codec) for tensor in tensors] for codec in ("auto", "smallest")]
            times = in_turns([partial(decode_all, packed) for packed in profiles], rounds, time.process_time)
            ours, smallest = (spread([gigabytes / seconds for seconds in column]) for column in times)
            used = " ".join(sorted({entry.codec for entry, _ in profiles[0]}))
            print(f"{str(dtype).removeprefix('torch.'):<9}{kind:<12}{ours}  smallest {smallest}   {used}")
    print()


def encoding(layers: int, rounds: int, folder: Path) -> None:
    """Print the time of packing and writing against that of writing dense."""
    print("Encode and write, times the time of a dense save_file (limit: 3)")
    for dtype in (torch.float32, torch.float16):
        for kind in KINDS:
            tensors = weights(kind, layers, dtype)
            actions = [partial(save_dense, tensors, folder / "dense"), partial(save_file, tensors, folder / "packed")]
            dense, packed = in_turns(actions, rounds)
            ratios = [b / a for a, b in zip(dense, packed, strict=True)]
            print(f"{str(dtype).removeprefix('torch.'):<9}{kind:<12}{spread(ratios)}")
    print()


def loading(layers: int, rounds: int, folder: Path) -> None:
    """Print the time of `from_pretrained` of a packed model against the dense one, from a warm cache."""
    import transformers

    from hf_sparse import SparsityConfig, sparsify

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("from_pretrained of a packed BERT at 90 %, times that of the dense one, warm cache (limit: 1.3)")
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers))
    model.save_pretrained(folder / "dense-model")
    sparsify(model, SparsityConfig(sparsity=0.9, schedule="constant"))
    model.save_pretrained(folder / "packed-model")
    load = transformers.BertModel.from_pretrained
    dense, packed = in_turns([partial(load, folder / f"{name}-model") for name in ("dense", "packed")], rounds)
    print(f"float32  90 %        {spread([b / a for a, b in zip(dense, packed, strict=True)])}")
    print(f"seconds: dense {spread(dense)}, packed {spread(packed)}\n")


PARTS = {"size": size, "decoding": decoding, "encoding": encoding, "loading": loading}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS], choices=[*PARTS], metavar="part", help=", ".join(PARTS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    print(f"torch {torch.__version__}, 1 thread, {cpu}\n")
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            PARTS[part](args.layers, args.rounds, Path(folder))


if __name__ == "__main__":
    main()
