"""Peak memory of each process while a model that is sharded over processes trains, renews its masks, and is saved.

    python scripts/benchmarks/bench_sharded_memory.py                 # 400 M parameters, 2 processes, about 6 GB
    python scripts/benchmarks/bench_sharded_memory.py --small         # 7 M parameters, to try it
    python scripts/benchmarks/bench_sharded_memory.py --scorer none   # the same model without masks

A Llama shape with random weights, float32, AdamW, on CPU processes with gloo. The model is made without memory (meta
device), divided by `fully_shard`, one unit for each block, the embeddings and the LM head, and given memory and masks
only then: no process ever holds all of it.

For each phase the table has the peak of the resident memory since the phase began (VmHWM), less what the process held
before the model was made, next to what `scripts/tools/scaling.py` computes: its share (weights, gradients, optimizer
state, masks, scores), and one block. A tiny model goes through all of it first, so that what libraries take at first
use is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # so that freed tensors leave the process; read when a process starts
os.environ["MALLOC_ARENA_MAX"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_sparse import Pruner, SparsityConfig
from hf_sparse.pruning.shards import local
from scripts.tools.scaling import memory, sizes_of

SHAPES: dict[str, dict[str, Any]] = {
    "400M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "vocab_size": 16000},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5, "vocab_size": 4000},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64},
}
SCORERS: dict[str, Any] = {
    "none": None,
    "magnitude": "magnitude",
    "movement": {"name": "movement", "learning_rate": 0.1},
    "taylor": "taylor",
}
TOKENS = 16
PHASES = ("made", "training step", "selection", "second step", "save")


def status(field: str) -> int:
    """Return a number of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this script needs Linux")


def config_of(shape: str) -> LlamaConfig:
    """Return the config of a model."""
    return LlamaConfig(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, **SHAPES[shape])


def sharded_model(config: LlamaConfig) -> Any:
    """Make a model whose weights exist in shards alone."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    for unit in (*model.model.layers, model.model.embed_tokens, model.lm_head):
        fully_shard(unit)
    fully_shard(model)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for name, parameter in model.named_parameters():
        nn.init.ones_(local(parameter)) if "norm" in name else nn.init.normal_(local(parameter), std=0.02)
    return model


def run(shape: str, scorer: str, folder: Path) -> tuple[int, dict[str, int]]:
    """Return what the process held before, and the peak of each phase."""
    before = status("VmRSS")
    peaks: dict[str, int] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
        yield
        peaks[name] = status("VmHWM")

    config = config_of(shape)
    with phase("made"):
        model = sharded_model(config)
        options: dict[str, Any] = {"scorer": SCORERS[scorer], "sparsity": 0.9, "schedule": "constant"}
        pruners = [] if scorer == "none" else [Pruner(model, SparsityConfig(**options)).attach()]
        for pruner in pruners:
            pruner.step(0.0)
    optimizer = torch.optim.AdamW(pruners[0].parameter_groups() if pruners else model.parameters())
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    for name in ("training step", "second step"):
        with phase(name):
            model(input_ids=ids, labels=ids).loss.backward()
            for pruner in pruners:
                pruner.observe()
            optimizer.step()
        with phase("selection"):
            for pruner in pruners:
                pruner.step(0.5)
        optimizer.zero_grad(set_to_none=False)  # gradients stay in memory, as the share counts them
    for pruner in pruners:  # of a model without masks it is not we who save shards
        pruner.bake()
        with phase("save"):
            model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    return before, peaks


def worker(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Measure one process, and leave the numbers in a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", options.processes)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes)
    run("tiny", options.scorer, Path(folder, "tiny"))
    before, peaks = run(options.shape, options.scorer, Path(folder, "out"))
    found = {name: peak - before for name, peak in peaks.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def table(options: argparse.Namespace, found: list[dict[str, int]], saved: int) -> str:
    """Return the Markdown table."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(options.shape))
    sizes = sizes_of(model)
    parts = memory(sizes, "FSDP2", options.processes, options.scorer == "movement")
    if options.scorer == "taylor":
        parts["scores"] = 2 * 4 * sizes.targeted / options.processes  # the importance, and the gradient of a step
    if options.scorer == "none":
        parts["masks"] = 0.0
        parts["one block"] -= (1 + 4) * sizes.layer
    block, share = parts.pop("one block"), sum(parts.values())
    largest = max(parameter.numel() for parameter in model.parameters())
    first = parts["weights"] + parts["masks"] + parts["scores"] / (4 if options.scorer == "movement" else 1)
    lines = [
        f"{sizes.parameters / 1e6:.0f} M parameters, {sizes.targeted / 1e6:.0f} M with masks, {options.scorer}, "
        f"{options.processes} processes; in MB",
        "",
        f"| phase | share | one block | {' | '.join(f'process {rank}' for rank in range(len(found)))} | over |",
        "|---|---|---|" + "---|" * (len(found) + 1),
    ]
    for name in (name for name in PHASES if name in found[0]):
        mine = first if name == "made" else share
        extra = saved / options.processes + 4 * largest if name == "save" else block
        peaks = [each[name] for each in found]
        over = max(0.0, max(peaks) - mine - extra)
        cells = [f"{size / 1e6:.1f}" for size in (mine, extra, *peaks, over)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "In the last row: its part of the file and the largest weight instead of a block."])


def main() -> None:
    """Start the processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scorer", choices=sorted(SCORERS), default="magnitude")
    parser.add_argument("--small", dest="shape", action="store_const", const="small", default="400M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processes: Any = torch.multiprocessing
        processes.spawn(worker, (options, folder), nprocs=options.processes)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.processes)]
        saved = sum(path.stat().st_size for path in Path(folder, "out").glob("*.safetensors"))
    print(table(options, found, saved))


if __name__ == "__main__":
    main()
