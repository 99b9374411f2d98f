"""Time and memory of one-shot pruning of a large checkpoint, block by block, beside a plain loop.

    python scripts/benchmarks/bench_oneshot.py make FOLDER [--shape 7b] [--blocks 4]
    python scripts/benchmarks/bench_oneshot.py run FOLDER [--scorer sparsegpt] [--samples 4] [--length 512] [--output F]
    python scripts/benchmarks/bench_oneshot.py loop FOLDER [--scorer sparsegpt] ...      # the plain loop, in memory

`make` writes a checkpoint of random weights in the shape of a Llama of 7 billion parameters, cut to some of its 32
blocks. `run` prunes it with `sparsify_checkpoint` and prints CPU seconds for each block after the first, the peak of
memory of the process, and what follows for all 32 blocks: memory does not grow with their number, time does. `loop`
does what the published code of SparseGPT and Wanda does, with the whole model in memory: hooks on every layer, one
Hessian for each, an explicit inverse. Equal numbers of threads give CPU seconds that can be compared, also on a
machine that does other things too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse import sparsify_checkpoint
from hf_sparse.formats.sharding import ShardWriter
from hf_sparse.hf.auto import model_class
from hf_sparse.utils.atomic_io import write_text

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "vocab_size": 32000},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 8000},
}
ALL_BLOCKS = 32


def make(folder: Path, shape: str, blocks: int) -> None:
    """Write a checkpoint tensor by tensor, in bfloat16."""
    config = LlamaConfig(num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], **SHAPES[shape])
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in model_class(config.architectures, config)(config).state_dict().items()
        }
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 1 << 30)
    generator = torch.Generator().manual_seed(0)
    for name, size in shapes.items():
        ones = name.endswith("norm.weight")
        tensor = torch.ones(size) if ones else torch.randn(size, generator=generator) * 0.02
        writer.add({name: tensor.bfloat16()})
    writer.finish({})
    config.save_pretrained(folder)
    print(f"{sum(size.numel() for size in shapes.values()):,} parameters in {folder}")


def batches(samples: int, length: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Return sequences of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(vocabulary, (1, length), generator=generator)} for _ in range(samples)]


def run(folder: Path, options: argparse.Namespace, data: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Prune by `sparsify_checkpoint`."""
    ends: dict[str, float] = {}
    begin = time.process_time()

    def on_layer(update: Any) -> None:
        ends[update.name.split(".layers.")[1].split(".")[0]] = time.process_time()

    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        sparsify_checkpoint(
            folder,
            Path(out) / "out",
            {"scorer": options.scorer, "sparsity": 0.5},
            data,
            spill=options.spill,
            on_layer=on_layer,
        )
        size = sum(path.stat().st_size for path in (Path(out) / "out").glob("*.safetensors"))
    times = list(ends.values())
    each = [after - before for before, after in itertools.pairwise(times)]
    return {
        "cpu_seconds_per_block": [round(seconds, 1) for seconds in each],
        "cpu_seconds": round(time.process_time() - begin, 1),
        "bytes_written": size,
        f"cpu_hours_for_{ALL_BLOCKS}_blocks": round(sum(each) / max(1, len(each)) * ALL_BLOCKS / 3600, 2),
    }


@torch.no_grad()
def loop(folder: Path, options: argparse.Namespace, data: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Prune as the published code does, written from the papers' formulas."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.model.layers
    captured: list[tuple[Tensor, dict[str, Any]]] = []

    class Catcher(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            captured.append((hidden, kwargs))
            raise StopIteration

    layers[0] = Catcher(layers[0])
    for batch in data:
        try:
            model(**batch, use_cache=False)
        except StopIteration:
            continue
    layers[0] = layers[0].inner
    hidden, times = [state for state, _ in captured], []
    for block in layers:
        begin = time.process_time()
        linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        sums = {
            name: torch.zeros(layer.in_features, layer.in_features if options.scorer == "sparsegpt" else 1)
            for name, layer in linear.items()
        }

        def gather(name: str, sums: dict[str, Tensor] = sums) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].flatten(0, -2)
                sums[name] += x.T @ x if options.scorer == "sparsegpt" else x.square().sum(0)[:, None]

            return hook

        handles = [layer.register_forward_pre_hook(gather(name)) for name, layer in linear.items()]
        for state, (_, kwargs) in zip(hidden, captured, strict=True):
            block(state, **kwargs)
        for handle in handles:
            handle.remove()
        tokens = sum(state.shape[1] for state in hidden)
        for name, layer in linear.items():
            prune = plain_sparsegpt if options.scorer == "sparsegpt" else plain_wanda
            layer.weight.copy_(prune(layer.weight, sums.pop(name), tokens))
        hidden = [block(state, **kwargs) for state, (_, kwargs) in zip(hidden, captured, strict=True)]
        times.append(round(time.process_time() - begin, 1))
    return {"cpu_seconds_per_block": times}


def plain_wanda(weight: Tensor, squares: Tensor, tokens: int) -> Tensor:
    """Return a weight without half of each row."""
    scores = weight.abs() * (squares[:, 0] / tokens).sqrt()
    order = scores.sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
    return weight.scatter(1, order, 0.0)


def plain_sparsegpt(weight: Tensor, products: Tensor, tokens: int, width: int = 128) -> Tensor:
    """Return a weight with half of it removed and the rest updated."""
    weight, hessian = weight.clone(), products * (2.0 / tokens)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        part, u = weight[:, start:end].clone(), factor[start:end, start:end]
        scores = part.square() / u.diagonal().square()
        removed = scores <= scores.flatten().sort().values[scores.numel() // 2]
        kept, errors = torch.zeros_like(part), torch.zeros_like(part)
        for i in range(end - start):
            column = part[:, i]
            kept[:, i] = column.masked_fill(removed[:, i], 0)
            error = (column - kept[:, i]) / u[i, i]
            part[:, i:] -= error[:, None] @ u[i : i + 1, i:]
            errors[:, i] = error
        weight[:, start:end] = kept
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "loop"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--scorer", choices=("sparsegpt", "wanda"), default="sparsegpt")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--spill", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "make":
        shutil.rmtree(options.folder, ignore_errors=True)
        make(options.folder, options.shape, options.blocks)
        return
    vocabulary = LlamaConfig.from_pretrained(options.folder).vocab_size
    found = (run if options.what == "run" else loop)(
        options.folder, options, batches(options.samples, options.length, vocabulary)
    )
    found |= {
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "setting": f"{options.what}, {options.scorer}, {options.samples} x {options.length}, spill {options.spill}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(json.dumps(found, indent=2))
    if options.output is not None:
        write_text(options.output, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
