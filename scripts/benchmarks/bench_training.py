"""Time per optimizer step of the Trainer with SparsityCallback against the plain Trainer, interleaved.

    python scripts/benchmarks/bench_training.py --model-shape minilm-l6 --methods movement magnitude --rounds 10

Weights and data are random; the loop is the real `Trainer.train`, with its data loader, optimizer and clipping. In each
round every variant trains a fresh model for some steps, in the reverse order of the round before, and its mean time
per step (masks need not be renewed at every step, so a median would hide them) is divided by the plain Trainer's of the
same round. What else the machine does then falls on both. The figure to quote is the median ratio with its quartiles.

Memory is the peak of what the process held (VmHWM), each variant in a new process of its own that trains a few steps:
in one process the memory that an earlier variant has freed would hide what a later one takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sparse import SparsityCallback, SparsityConfig
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave, quartiles, ratios

SHAPES: dict[str, dict[str, Any]] = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
METHODS: dict[str, dict[str, Any] | None] = {
    "magnitude": {"scorer": "magnitude"},
    "movement": {"scorer": "movement"},
    "movement_bf16": {"scorer": {"name": "movement", "dtype": "bfloat16"}},
    "soft_movement": {"scorer": "soft_movement"},
    "block": {"scorer": "movement", "pattern": {"name": "block", "rows": 32, "cols": 32}},
    "heads+neurons": {"scorer": "movement", "pattern": "head+neuron"},
    "plain_again": None,  # how far two equal variants come apart on this machine, now
}
PLAIN = "plain"
Row = dict[str, torch.Tensor]


class RandomTexts(Dataset[Row]):
    """Sequences of random token ids, all of one length, with labels 0 and 1."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


class StepClock(TrainerCallback):
    """The time at the end of every step; the difference of two holds all that happens in a step, callbacks included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def peak_memory_mib() -> float | None:
    """Return the largest resident memory of this process; None where the kernel keeps no record."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def memory_of(variant: str) -> float | None:
    """Return the peak memory in MiB of a new process, started with our own options, that trains one variant."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: float | None = json.loads(done.stdout.splitlines()[-1])
    return found


def run(variant: str, options: argparse.Namespace, folder: str) -> float:
    """Train a fresh model and return seconds per step."""
    gc.collect()
    torch.manual_seed(0)
    config = BertConfig(**SHAPES[options.model_shape])
    callbacks: list[TrainerCallback] = []
    method = METHODS.get(variant)
    if method is not None:
        # Constant: full work from the first step on, where a real run has a dense part and a ramp before it.
        callbacks.append(SparsityCallback(SparsityConfig(sparsity=options.sparsity, schedule="constant", **method)))
    clock = StepClock()
    steps = options.warmup + options.steps
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=RandomTexts(options.batch * steps, options.length, config.vocab_size),
        callbacks=[*callbacks, clock],
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run of some seconds is too short to learn scores, and need not be told so
        trainer.train()
    return (clock.ends[-1] - clock.ends[options.warmup - 1]) / options.steps


class Meter:
    """A clock that goes on by the time per step of each run, and stands still while a model is made and warms up."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.folder, self.total = options, folder, 0.0

    def read(self) -> float:
        """Return the sum of all runs so far, in seconds per step."""
        return self.total

    def run(self, variant: str) -> None:
        """Train one variant."""
        seconds = run(variant, self.options, self.folder)
        self.total += seconds
        if not self.options.json:
            print(f"{variant} {1e3 * seconds:.0f} ms", flush=True)


def summary(variant: str, seconds: dict[str, list[float]], memory: dict[str, float | None]) -> dict[str, Any]:
    """Return the figures of one variant over all rounds."""
    return {
        "milliseconds_per_step": list(quartiles([1e3 * each for each in seconds[variant]])),
        "ratio_to_plain": list(quartiles(ratios(seconds, variant, PLAIN))),
        "peak_memory_mib": memory.get(variant),
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model-shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["magnitude", "movement", "soft_movement", "block"]
    )
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens per text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps measured per variant and round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least one")
    parser.add_argument("--no-memory", action="store_true", help="leave the processes that measure memory out")
    parser.add_argument("--peak-of", choices=[PLAIN, *METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    options = parser.parse_args()
    if min(options.warmup, options.steps, options.rounds, options.threads) < 1:
        parser.error("--warmup, --steps, --rounds and --threads are at least 1")
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    variants = [PLAIN, *options.methods]
    with tempfile.TemporaryDirectory() as folder:
        if options.peak_of is not None:
            run(options.peak_of, options, folder)
            print(json.dumps(peak_memory_mib()))
            return
        memory = {} if options.no_memory else {variant: memory_of(variant) for variant in variants}
        run(PLAIN, options, folder)  # the first run of a process pays for what the others share
        meter = Meter(options, folder)
        runs = {variant: partial(meter.run, variant) for variant in variants}
        seconds = interleave(runs, options.rounds, warmup=0, clock=meter.read, inference=False)
    report = {
        "machine": machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        **{key: getattr(options, key) for key in ("model_shape", "batch", "length", "sparsity", "rounds", "steps")},
        "variants": {variant: summary(variant, seconds, memory) for variant in variants},
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"\n{options.model_shape}, batch {options.batch} x {options.length} tokens, {report['dtype']}, "
        f"{options.sparsity:.0%} sparse, {options.rounds} rounds of {options.steps} steps\n"
        f"{report['machine']}, transformers {transformers.__version__}\n"
    )
    head = f"{'':14}{'ms per step':>12}{'quartiles':>18}{'ratio to plain':>16}{'quartiles':>16}{'peak MiB':>10}"
    print(f"{head}{'to plain':>10}")
    for variant, figures in report["variants"].items():
        first, time_per_step, third = figures["milliseconds_per_step"]
        low, middle, high = figures["ratio_to_plain"]
        peak, plain = figures["peak_memory_mib"], memory.get(PLAIN)
        more = "-" if peak is None or plain is None else f"{peak - plain:+.0f}"
        print(
            f"{variant:14}{time_per_step:12.1f}{f'{first:.1f} - {third:.1f}':>18}{middle:16.3f}"
            f"{f'{low:.3f} - {high:.3f}':>16}{'-' if peak is None else f'{peak:.0f}':>10}{more:>10}"
        )


if __name__ == "__main__":
    main()
