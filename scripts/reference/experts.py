"""A small mixture of experts on bytes of text, and what pruning its experts costs at equal stored bytes.

    python scripts/reference/experts.py --train valid.txt --test test.txt --output recipes/reference/experts.json
        [--models runs/experts] [--seeds 0 1 2] [--budgets 0.75 0.5] [--methods magnitude "whole experts, REAP"]

For each seed a decoder of the shape of Mixtral (8 experts, 2 for each byte) is trained from scratch on one text, unless
the folder of models has it; copies are pruned in one shot, without training after it, and all are measured in bits per
byte on the beginning of another text. Of the bytes of the expert weights a budget is left: values and a bitmask, or
whole experts. Attention and embeddings stay as they are. Calibration uses samples of the training text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import MixtralConfig, MixtralForCausalLM

from hf_sparse import drop_experts, prune_experts, sparsify
from hf_sparse.analysis.perplexity import mean_loss
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.architectures import known_experts
from hf_sparse.profiling.machine import machine
from hf_sparse.recipe.texts import TokenStream, calibration_batches, read_text
from hf_sparse.utils.atomic_io import write_text

EXPERTS = 8
BATCH, LENGTH = 16, 128
RATE = 2e-3


def bytes_of(path: Path) -> TokenStream:
    """Return a text, a token for each byte."""
    return TokenStream(tuple(read_text(path).encode()))


def train(stream: TokenStream, steps: int, seed: int) -> Any:
    """Return a model that was trained from scratch."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=2 * LENGTH,
        output_router_logits=True, router_aux_loss_coef=0.01, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    samples = torch.cat(stream.samples(steps * BATCH, LENGTH, seed)).split(BATCH)
    for ids in tqdm(samples, desc="Training", disable=None):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    return model.eval()


def dense_model(folder: Path, stream: TokenStream, steps: int, seed: int) -> Any:
    """Return the model of a folder, trained if it is not there."""
    if not (folder / "config.json").is_file():
        train(stream, steps, seed).save_pretrained(folder)
    return MixtralForCausalLM.from_pretrained(folder).eval()


Prune = Callable[[Any, list[dict[str, torch.Tensor]], int], object]
"""What changes a model in place, given calibration data and a seed."""


def methods(budget: float) -> dict[str, Prune]:
    """Return what prunes the experts of a model, in place, to a part of their bytes."""
    sparsity = 1 - (budget - 1 / 32)  # 32-bit values and a bitmask

    def masks(calibrated: bool = False, **group: Any) -> Prune:
        config = {"targets": ["*.experts"], "sparsity": sparsity, **group}
        return lambda model, data, seed: sparsify(model, config, data if calibrated else None)

    def at_random(model: Any, data: Any, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        left = round(budget * EXPERTS)
        kept = {b.name: torch.randperm(EXPERTS, generator=draw)[:left].tolist() for b in known_experts(model)}
        drop_experts(model, kept)

    found: dict[str, Prune] = {
        "magnitude": masks(),
        "random": lambda model, data, seed: masks(scorer={"name": "random", "seed": seed})(model, data, seed),
        "wanda": masks(True, scorer="wanda"),
        "sparsegpt": masks(True, scorer="sparsegpt"),
        "whole experts, REAP": lambda model, data, seed: prune_experts(model, data, 1 - budget),
        "whole experts, random": at_random,
    }
    if budget == 0.5:  # 2:4 leaves half of the values and says where they are
        group = {"targets": ["*.experts"], "pattern": "2:4"}
        found["2:4, magnitude"] = lambda model, data, seed: sparsify(model, group)
        found["2:4, wanda"] = lambda model, data, seed: sparsify(model, {**group, "scorer": "wanda"}, data)
    return found


def stored_bytes(model: Any) -> int:
    """Return the size of the weight files that a model is saved in."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(inspect(folder).files.values())


def main() -> None:
    """Train, prune and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/experts"), help="folder of what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=300, help="of 128 bytes, to measure on")
    parser.add_argument("--samples", type=int, default=64, help="of 128 bytes, to calibrate with")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--methods", nargs="+", help="names of rows; without it, all of them")
    options = parser.parse_args()
    seen, windows = bytes_of(options.train), list(bytes_of(options.test).windows(LENGTH, most=options.windows))
    rows: dict[tuple[float, str], dict[str, Any]] = {}

    def add(budget: float, method: str, model: Any, share: float) -> None:
        row = rows.setdefault((budget, method), {"budget": budget, "method": method, "share": share, "bits": []})
        row["bits"].append(round(mean_loss(model, windows) / math.log(2), 4))
        print(f"| {share:.1%} | {method} | {statistics.mean(row['bits']):.3f} | {row['bits'][-1]:.3f} |", flush=True)
        facts = {"metric": "bits per byte, one for each seed", "windows": len(windows), "steps": options.steps}
        found = {**facts, "seeds": options.seeds, "machine": machine(), "rows": list(rows.values())}
        write_text(options.output, json.dumps(found, indent=1) + "\n")

    for seed in options.seeds:
        dense = dense_model(options.models / f"{options.steps}-steps-{seed}", seen, options.steps, seed)
        data = calibration_batches(seen, options.samples, LENGTH, seed, "cpu")
        whole = sum(w.nbytes for block in known_experts(dense) for w in block.experts.parameters())
        rest = stored_bytes(dense) - whole
        add(1.0, "dense", dense, 1.0)
        for budget in options.budgets:
            for name, prune in methods(budget).items():
                if options.methods and name not in options.methods:
                    continue
                model = copy.deepcopy(dense)
                prune(model, data, seed)
                add(budget, name, model, (stored_bytes(model) - rest) / whole)


if __name__ == "__main__":
    main()
