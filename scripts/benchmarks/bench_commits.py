"""Compare the speed of two checkouts of hf_sparse: inference in runtime form, and training steps. Interleaved.

    git worktree add ../before COMMIT && (cd ../before && python -m hf_sparse.kernels.build)
    python scripts/benchmarks/bench_commits.py ../before [--cases runtime training] [--rounds 7] [--json FILE]

Each checkout has one process, and only one of the two computes at a time. In each round both run each case, in an order
that alternates; the result is the time of this checkout relative to the other, round by round: median and quartiles.
Below 1 this checkout is faster. Only names that both have are used, so any two commits with the public API compare:
the processes time with their own few lines, since the harness of this checkout may be missing in the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
CASES = ("runtime", "training")


def runtime_cases() -> dict[str, Callable[[], float]]:
    """Return the name of each inference case and a function that measures it in seconds."""
    import torch
    import transformers

    import hf_sparse

    def bert(pattern: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=4)).eval()
        hf_sparse.sparsify(model, hf_sparse.SparsityConfig(sparsity=0.9, pattern=pattern))
        hf_sparse.to_runtime(model, "cpu")
        return model

    def case(model: Any, batch: int, length: int, calls: int) -> Callable[[], float]:
        ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(1))

        @torch.inference_mode()
        def measure() -> float:
            model(input_ids=ids)
            seconds = []
            for _ in range(calls):
                start = time.perf_counter()
                model(input_ids=ids)
                seconds.append(time.perf_counter() - start)
            return statistics.median(seconds)

        return measure

    element, block = bert("element"), bert({"name": "block", "rows": 4, "cols": 1})
    t5_config: Any = transformers.T5Config
    t5 = transformers.T5ForConditionalGeneration(
        t5_config(vocab_size=4000, decoder_start_token_id=0, tie_word_embeddings=False)
    ).eval()
    hf_sparse.sparsify(t5, hf_sparse.SparsityConfig(sparsity=0.9))
    hf_sparse.to_runtime(t5, "cpu")
    ids = torch.randint(5, 1000, (1, 32), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def generate() -> float:
        start = time.perf_counter()
        t5.generate(input_ids=ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        return time.perf_counter() - start

    return {
        "BERT-base layers x4, unstructured 90 %, 1x128": case(element, 1, 128, 9),
        "BERT-base layers x4, unstructured 90 %, 8x128": case(element, 8, 128, 3),
        "BERT-base layers x4, unstructured 90 %, 1x8": case(element, 1, 8, 15),
        "BERT-base layers x4, 4x1 blocks 90 %, 1x128": case(block, 1, 128, 9),
        "T5-small, unstructured 90 %, 16 tokens generated": generate,
    }


def training_cases() -> dict[str, Callable[[], float]]:
    """Return the name of each training case and a function that measures one optimizer step in seconds."""
    import torch
    import transformers

    import hf_sparse

    transformers.logging.set_verbosity_error()
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *arguments: Any, **_: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    class Examples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.randint(5, 1000, (128,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": ids, "labels": ids[0] % 2}

    def case(config: dict[str, Any] | None, finished: bool = False) -> Callable[[], float]:
        def measure() -> float:
            torch.manual_seed(0)
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
            if finished:
                hf_sparse.sparsify(model, hf_sparse.SparsityConfig(sparsity=0.9))
            clock = Clock()
            callbacks: list[Any] = [clock]
            if config is not None:
                callbacks.insert(0, hf_sparse.SparsityCallback(hf_sparse.SparsityConfig.from_dict(config)))
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    output_dir=folder, max_steps=6, per_device_train_batch_size=16, report_to=[], disable_tqdm=True,
                    save_strategy="no", logging_strategy="no", use_cpu=True, dataloader_pin_memory=False,
                )  # fmt: skip
                trainer = transformers.Trainer(
                    model=model, args=arguments, train_dataset=Examples(), callbacks=callbacks
                )
                trainer.train()
            return statistics.median(clock.seconds[2:])

        return measure

    schedule = {"name": "cubic", "begin": 0.0, "end": 0.9}
    return {
        "MiniLM-L6 shape, plain Trainer": case(None),
        "MiniLM-L6 shape, magnitude": case({"sparsity": 0.9, "schedule": schedule}),
        "MiniLM-L6 shape, movement": case({"sparsity": 0.9, "scorer": "movement", "schedule": schedule}),
        "MiniLM-L6 shape, zeros of a finished model kept": case(None, finished=True),
    }


def work(groups: list[str], threads: int) -> None:
    """Measure the case that each line of standard input names, and print its seconds."""
    import torch

    torch.set_num_threads(threads)
    cases = {}
    for group in groups:
        cases.update(runtime_cases() if group == "runtime" else training_cases())
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        print(json.dumps(cases[line.strip()]()), flush=True)


class Worker:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path, groups: list[str], threads: int) -> None:
        command = [sys.executable, __file__, str(checkout), "--work", "--threads", str(threads), "--cases", *groups]
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )
        self.cases: list[str] = self.read()

    def read(self) -> Any:
        """Return the next line of results; other lines are messages of libraries."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("[", *"0123456789")):
                return json.loads(line)
        sys.exit("a worker ended before its result: run it by hand to see why")

    def measure(self, case: str) -> float:
        """Return the seconds of a case."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return float(self.read())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with, with its kernels built")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.cases, options.threads)
        return
    from hf_sparse.profiling.machine import machine
    from hf_sparse.profiling.timer import in_rounds, quartiles, ratios

    here, other = (Worker(path, options.cases, options.threads) for path in (HERE, options.other.resolve()))
    workers = {"here": here, "other": other}
    runs = {(case, name): partial(worker.measure, case) for case in here.cases for name, worker in workers.items()}
    seconds = in_rounds(runs, options.rounds, warmup=0)  # each case has its own
    relative = {case: ratios(seconds, (case, "here"), (case, "other")) for case in here.cases}
    print(f"{machine()}, {options.threads} threads, {options.rounds} rounds: time of this checkout / time of the other")
    print("| case | median | quartiles |\n|---|---|---|")
    for case, values in relative.items():
        low, middle, high = quartiles(values)
        print(f"| {case} | {middle:.3f} | {low:.3f} - {high:.3f} |")
    if options.json:
        options.json.write_text(json.dumps(relative, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
