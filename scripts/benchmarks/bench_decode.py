"""Decode with a pruned causal model in runtime form, beside dense torch and llama.cpp: speed and perplexity.

    python scripts/benchmarks/bench_decode.py DENSE SPARSE [--backends bitmask bitmask-int8] [--data test.txt]
        [--gguf PYTHON FILE [FILE ...]] [--tokens 64] [--rounds 7] [--threads 1] [--json FILE]

DENSE is the folder of the model, SPARSE of the same model pruned (`hf-sparse prune DENSE --scorer sparsegpt ...`).
Engines of torch: the dense model in float32 and in bfloat16, the sparse one in runtime form. Before anything is
timed, the logits of the exact forms are compared with those of the sparse model in torch. Each engine then generates as
many tokens, greedily, from the same prompt. Figures are ratios over the faster dense type of torch, round by round:
median and quartiles. With --data also the perplexity of each (windows of 512 tokens, with BOS if the model has one).

llama.cpp runs in an environment of its own (PYTHON with llama-cpp-python), with the model in its own format (GGUF).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PROMPT = "The history of the city begins in the twelfth century, when"
WINDOW = 512

LLAMA = """
import json, sys, time
from llama_cpp import Llama
file, threads, count, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
llama = Llama(file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, seed=0)
ids = llama.tokenize(prompt.encode())
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    llama.reset()
    llama.eval(ids)
    start = time.perf_counter()
    token = llama.sample(temp=0.0)
    for _ in range(count):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    print(json.dumps((time.perf_counter() - start) / count), flush=True)
"""


class LlamaCpp:
    """A model of llama.cpp in a process of its own."""

    def __init__(self, python: str, file: str, threads: int, tokens: int) -> None:
        command = [python, "-c", LLAMA, file, str(threads), str(tokens), PROMPT]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("llama.cpp ended before its result: run it by hand to see why")
        return json.loads(line)

    def __call__(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.read())


def torch_engine(model: Any, ids: Any, tokens: int) -> Callable[[], float]:
    """Return a function that decodes and gives the seconds of a token, without those of the prompt."""
    import time

    import torch

    @torch.inference_mode()
    def run() -> float:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) / tokens

    return run


def check(models: dict[str, Any], sparse: Any, ids: Any) -> dict[str, float]:
    """Return the largest deviation of the logits of each runtime form, as a fraction of the largest logit."""
    import torch

    with torch.inference_mode():
        expected = [sparse(input_ids=part).logits for part in (ids, ids[:, :1])]
        found = {name: [model(input_ids=part).logits for part in (ids, ids[:, :1])] for name, model in models.items()}
    return {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(each, expected, strict=True))
        for name, each in found.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("sparse")
    parser.add_argument("--backends", nargs="+", default=["bitmask", "bitmask-int8"])
    parser.add_argument("--gguf", nargs="+", metavar="FILE", help="a Python with llama-cpp-python, then files")
    parser.add_argument("--data", help="text for the perplexity")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_sparse
    from hf_sparse.analysis.perplexity import mean_loss
    from hf_sparse.kernels import KERNELS
    from hf_sparse.profiling.machine import machine
    from hf_sparse.profiling.timer import in_rounds, quartiles, ratios
    from hf_sparse.recipe.texts import TokenStream

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def load(folder: str, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    sparse = load(options.sparse)
    forms = {}
    for backend in options.backends:
        forms[f"sparse, {backend}"] = load(options.sparse)
        print(hf_sparse.to_runtime(forms[f"sparse, {backend}"], backend))
    errors = check(forms, sparse, ids)
    for name, error in errors.items():
        backend = name.removeprefix("sparse, ")
        if (backend == "auto" or KERNELS.backends[backend].exact) and error > 1e-4:
            sys.exit(f"{name}: the logits deviate by {error:.2e} of the largest")
    del sparse  # memory for the next ones
    models = {"dense, float32": load(options.dense), "dense, bfloat16": load(options.dense, torch.bfloat16), **forms}
    losses = {}
    if options.data:
        stream = TokenStream.of(Path(options.data).read_text(encoding="utf-8"), tokenizer, "auto")
        windows = list(stream.windows(WINDOW, None, options.windows))
        losses = {name: math.exp(mean_loss(model, windows)) for name, model in models.items()}
    engines = {name: torch_engine(model, ids, options.tokens) for name, model in models.items()}
    for file in (options.gguf or [])[1:]:
        engines[f"llama.cpp, {Path(file).name}"] = LlamaCpp(options.gguf[0], file, options.threads, options.tokens)
    seconds = in_rounds(engines, options.rounds, warmup=1)
    best = min((name for name in models if name.startswith("dense")), key=lambda name: sorted(seconds[name])[0])
    print(f"{machine()}, {options.threads} threads, {options.tokens} tokens, {options.rounds} rounds; over {best}")
    print("| engine | tokens/s | speed-up | quartiles | perplexity | deviation of logits |\n|---|---|---|---|---|---|")
    result = {}
    for name, each in seconds.items():
        low, middle, high = quartiles(ratios(seconds, best, name))
        rate = 1 / quartiles(each)[1]
        said = f"{losses[name]:.2f}" if name in losses else "-"
        deviation = f"{errors[name]:.1e}" if name in errors else "-"
        print(f"| {name} | {rate:.1f} | {middle:.2f} | {low:.2f} - {high:.2f} | {said} | {deviation} |")
        result[name] = {
            "tokens_per_second": rate, "speedup": [low, middle, high], "perplexity": losses.get(name),
            "logit_deviation": errors.get(name),
        }  # fmt: skip
    if options.json:
        facts = {"machine": machine(), "threads": options.threads, "tokens": options.tokens, "over": best}
        options.json.write_text(json.dumps({**facts, "engines": result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
