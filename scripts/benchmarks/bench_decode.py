"""Decode with pruned causal models in runtime form, beside dense torch and llama.cpp: speed, bytes and perplexity.

    python scripts/benchmarks/bench_decode.py DENSE SPARSE [--backends bitmask bitmask-int8=FOLDER bitmask-int4=FOLDER]
        [--compile] [--data test.txt] [--gguf PYTHON FILE [FILE ...]] [--tokens 64] [--rounds 7] [--threads 1]
        [--json FILE]

DENSE is the folder of the model, SPARSE of the same model pruned (`hf-sparse prune DENSE --scorer sparsegpt ...`). A
backend may have a folder of its own: for int8 and int4 the model that was pruned for it, with
`--scorer "{name: sparsegpt, bits: 4}"`. Engines of torch: the dense model in float32 and in bfloat16, each as it is
loaded and with its weights in huge pages (where `to_runtime` puts packed ones), the sparse ones in runtime form. Before
anything is timed, the logits of the exact forms are compared with those of the sparse model in torch. Each engine then
generates as many tokens, greedily, from the same prompt. Figures are ratios over the fastest dense engine of torch,
round by round: median and quartiles; in brackets over the fastest one as it is loaded. With --data also the perplexity
of each (windows of 512 tokens, with BOS if the model has one; the same tokens in llama.cpp). With --compile each engine
of torch is there a second time, dense ones too: its steps in torch.compile, with a static cache. Before those are
timed, their logits are compared with those of the same model uncompiled, token by token of the prompt.

Bytes of a token are those of all weights that a matmul of one token reads, without those of the cache; of a GGUF file,
those of the file. What memory can give is measured beside it: the sum of a tensor much larger than the caches.

llama.cpp runs in an environment of its own (PYTHON with llama-cpp-python), with the model in its own format (GGUF).
Results are kept in --json (recipes/reference/decode.json), by model, threads, --compile, and --avx2 or
ONEDNN_MAX_CPU_ISA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avx2_code import keep_to_avx2  # type: ignore[import-not-found]  # beside this file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "recipes" / "reference" / "decode.json"
ONEDNN = "ONEDNN_MAX_CPU_ISA"
"""Limits what torch takes for dense bfloat16: with AVX2 it is faster for one token on a Zen 4."""

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

LLAMA_LOSS = """
import json, sys
import numpy as np
from llama_cpp import Llama
file, threads = sys.argv[1], int(sys.argv[2])
llama = Llama(file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, seed=0, logits_all=True)
total, count = 0.0, 0
for ids, scored in json.load(sys.stdin):
    llama.reset()
    llama.eval(ids)
    for place in range(len(ids) - scored, len(ids)):
        row = llama.scores[place - 1].astype(np.float64)
        total -= row[ids[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
    count += scored
print(json.dumps(total / count))
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


def llama_loss(python: str, file: str, threads: int, windows: Sequence[Any]) -> float:
    """Return the mean loss of a model of llama.cpp on windows of token ids."""
    given = json.dumps([[window.ids[0].tolist(), window.scored] for window in windows])
    command = [python, "-c", LLAMA_LOSS, file, str(threads)]
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def torch_engine(model: Any, ids: Any, tokens: int) -> Callable[[], float]:
    """Return a function that decodes and gives the seconds of a token, without those of the prompt."""
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


def bytes_of_a_token(model: Any) -> int:
    """Return the bytes of the weights that the matmuls of one token read."""
    from torch import nn

    from hf_sparse.runtime.packed_linear import PackedLinear

    def read(parts: Sequence[Any], in_features: int) -> int:
        if len(parts) < 3:
            return sum(part.nbytes for part in parts)
        _, bits, pointers = parts[:3]
        whole = int((pointers.diff() == in_features).sum()) if bits.dim() == 2 else 0  # rows whose bits are not read
        return sum(part.nbytes for part in parts) - whole * bits.nbytes // max(1, len(bits))

    total = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            if module.joint is None or module.joint.layers[0] is module:
                total += read(module.packed.operands, module.in_features)
        elif isinstance(module, nn.Linear):
            copied = vars(module).get("few_token_copy")
            total += module.weight.nbytes if copied is None else read(copied[1], module.in_features)
    return total


def memory_rate(rounds: int = 5) -> float:
    """Return the bytes a second at which torch adds up a tensor of 512 MiB."""
    import torch

    numbers, seconds = torch.ones(1 << 27), []
    for _ in range(rounds):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / sorted(seconds)[rounds // 2]


def deviation(model: Any, sparse: Any, ids: Any) -> float:
    """Return the largest deviation of the logits of a runtime form, as a fraction of the largest logit."""
    import torch

    with torch.inference_mode():
        pairs = [(model(input_ids=part).logits, sparse(input_ids=part).logits) for part in (ids, ids[:, :1])]
    return max(float((found - exact).abs().max() / exact.abs().max()) for found, exact in pairs)


def load(folder: str, kind: str = "float32") -> Any:
    """Return the causal model of a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).eval()


def in_huge_pages(model: Any) -> Any:
    """Move the weights of a model to where `to_runtime` puts packed ones."""
    from hf_sparse.runtime.huge_pages import HugePages

    memory = HugePages()
    for parameter in model.parameters():
        parameter.data = memory.take([parameter.data])[0]
    return model


def runtime_forms(options: argparse.Namespace, ids: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the sparse models in runtime form, and what is known of each."""
    import hf_sparse
    from hf_sparse.kernels import KERNELS

    forms = {}
    for spec in options.backends:
        backend, _, folder = spec.partition("=")
        model, sparse = (load(folder or options.sparse) for _ in range(2))
        report = hf_sparse.to_runtime(model, backend)
        print(report)
        off = deviation(model, sparse, ids)
        if (backend == "auto" or KERNELS.backends[backend].exact) and off > 1e-4:
            sys.exit(f"{spec}: the logits deviate by {off:.2e} of the largest")
        errors = [layer.weight_error for layer in report.sparse if layer.weight_error is not None]
        facts: dict[str, Any] = {"logit_deviation": off}
        if errors:
            facts["largest_weight_error"] = max(errors)
        forms[f"sparse, {backend}{', pruned for it' if folder else ''}"] = model, facts
    return forms


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("sparse")
    parser.add_argument("--backends", nargs="+", default=["bitmask", "bitmask-int8", "bitmask-int4"])
    parser.add_argument("--gguf", nargs="+", metavar="FILE", help="a Python with llama-cpp-python, then files")
    parser.add_argument("--compile", action="store_true", help="each engine of torch in torch.compile too")
    parser.add_argument("--data", help="text for the perplexity")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--avx2", action="store_true", help="keep to AVX2 what has a switch for it; see avx2_code.py")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and keep the figures."""
    options = parse()
    if options.avx2:
        keep_to_avx2()
    import torch
    from transformers import AutoTokenizer

    from hf_sparse.analysis.perplexity import mean_loss
    from hf_sparse.kernels import library_status
    from hf_sparse.profiling.machine import machine
    from hf_sparse.profiling.timer import in_rounds, quartiles, ratios
    from hf_sparse.recipe.texts import TokenStream
    from hf_sparse.utils.atomic_io import read_json, write_text

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    forms = runtime_forms(options, ids)
    models: dict[str, Any] = {f"dense, {kind}": load(options.dense, kind) for kind in ("float32", "bfloat16")}
    models |= {f"{name}, huge pages": in_huge_pages(load(options.dense, name.split()[1])) for name in models}
    known: dict[str, dict[str, Any]] = {name: {} for name in models} | {
        name: facts for name, (_, facts) in forms.items()
    }
    models |= {name: model for name, (model, _) in forms.items()}
    for name, model in models.items():
        known[name]["bytes_per_token"] = bytes_of_a_token(model)
    python, *files = options.gguf or [""]
    for file in files:
        known[f"llama.cpp, {Path(file).name}"] = {"bytes_per_token": Path(file).stat().st_size}
    if options.data:
        stream = TokenStream.of(Path(options.data).read_text(encoding="utf-8"), tokenizer, "auto")
        windows = list(stream.windows(WINDOW, None, options.windows))
        for name, model in models.items():
            known[name]["perplexity"] = math.exp(mean_loss(model, windows))
        for file in files:
            loss = llama_loss(python, file, options.threads, windows)
            known[f"llama.cpp, {Path(file).name}"]["perplexity"] = math.exp(loss)
    engines: dict[str, Any] = {name: torch_engine(model, ids, options.tokens) for name, model in models.items()}
    if options.compile:
        from compiled_steps import compiled_engines  # type: ignore[import-not-found]

        engines |= compiled_engines(models, known, ids, options.tokens)
    for file in files:
        engines[f"llama.cpp, {Path(file).name}"] = LlamaCpp(python, file, options.threads, options.tokens)
    memory = memory_rate()
    seconds = in_rounds(engines, options.rounds, warmup=1)
    dense = sorted((name for name in engines if name.startswith("dense")), key=lambda name: quartiles(seconds[name])[1])
    best, loaded = dense[0], next(name for name in dense if "huge pages" not in name)
    print(
        f"{machine()}, {library_status().isa}, {options.threads} threads, {options.tokens} tokens, {options.rounds} "
        f"rounds; over {best} (in brackets over {loaded}); memory gives {memory / 1e9:.1f} GB/s"
    )
    head = ("engine", "tokens/s", "speed-up", "quartiles", "MB/token", "GB/s", "perplexity")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, each in seconds.items():
        facts = known[name]
        low, middle, high = quartiles(ratios(seconds, best, name))
        rate = 1 / quartiles(each)[1]
        facts |= {
            "tokens_per_second": rate,
            "speedup": [low, middle, high],
            "speedup_over_loaded": quartiles(ratios(seconds, loaded, name)),
            "bytes_per_second": rate * facts["bytes_per_token"],
        }
        said = f"{facts['perplexity']:.2f}" if "perplexity" in facts else "-"
        speeds = f"{middle:.2f} ({facts['speedup_over_loaded'][1]:.2f}) | {low:.2f} - {high:.2f}"
        moved = f"{facts['bytes_per_token'] / 1e6:.0f} | {facts['bytes_per_second'] / 1e9:.1f}"
        print(f"| {name} | {rate:.1f} | {speeds} | {moved} | {said} |")
    results: dict[str, Any] = read_json(options.json) or {}
    case = f"{Path(options.dense).name}, {options.threads} thread{'s' if options.threads > 1 else ''}"
    limit = os.environ.get(ONEDNN)
    case += ", AVX2 code" if options.avx2 else f", {ONEDNN}={limit}" if limit else ""
    results[case + (", compiled too" if options.compile else "")] = {
        "machine": machine(),
        "instruction_set": library_status().isa,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "windows": options.windows if options.data else 0,
        "over": best,
        "loaded": loaded,
        "memory_bytes_per_second": memory,
        "engines": known,
    }
    write_text(options.json, json.dumps(results, indent=1) + "\n")
    print(f"kept in {options.json}")


if __name__ == "__main__":
    main()
