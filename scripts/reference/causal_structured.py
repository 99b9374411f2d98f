"""Perplexity of a causal language model after structured pruning and a short recovery, at equal parameters.

    python scripts/reference/causal_structured.py MODEL --train valid.txt --test test.txt
        --output recipes/reference/causal_structured.json [--steps 500] [--batch 1] [--length 256] [--windows 12]
        [--methods taylor random cosine loss none] [--save FOLDER] [--decode 64]

A fraction (25 %) of the gated neurons of every layer and of the KV heads of the model, each with its query heads,
leaves: those that matter least by a first-order Taylor expansion on samples of the training text, or random ones. Depth
removal takes as many layers as come nearest to the same number of weights, by cosine similarity or by loss. Then the
blocks train on random windows of the training text (AdamW, learning rate with linear decay, embeddings frozen); the
dense model trains alike ("none"), since part of what is won is that the model gets to know the text. Windows of the
test text are scored before and after, each with BOS if the tokenizer puts one before a text.

`--decode N` generates N tokens from one prompt with each model that was saved, interleaved with the dense model.
Results are added to the file one by one, and those that are there are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, compact, drop_layers, layer_importance, sparsify
from hf_sparse.analysis.perplexity import mean_loss
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.profiling.timer import interleave
from hf_sparse.pruning.depth import stack_of
from hf_sparse.recipe.texts import TokenStream, read_text
from hf_sparse.utils.atomic_io import read_json, write_text

Batches = list[dict[str, Tensor]]
WIDTH = ("taylor", "random")
"""Scorers of neurons and KV heads; the other methods remove layers."""


def block_parameters(model: Any) -> int:
    """Return the number of weights in the layers of a model, without embeddings."""
    return sum(parameter.numel() for parameter in stack_of(model)[1].parameters())


def remove_width(scorer: str, fraction: float, model: Any, batches: Batches) -> None:
    """Remove a fraction of the neurons of every layer, and of the KV heads of the model."""
    groups = [
        {"pattern": "neuron", "scorer": scorer, "sparsity": fraction},
        {"pattern": "kv_head", "scorer": scorer, "sparsity": fraction, "selection": "global"},
    ]
    sparsify(model, SparsityConfig(groups=groups), batches if scorer == "taylor" else None)
    compact(model)


def remove_depth(criterion: Any, weights: int, model: Any, batches: Batches) -> None:
    """Remove as many layers as come nearest to this number of weights, the least important first."""
    layers = stack_of(model)[1]
    each = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    order = layer_importance(model, batches, criterion).argsort().tolist()
    sums = [sum(each[index] for index in order[:count]) for count in range(len(each))]
    count = min(range(len(each)), key=lambda count: abs(sums[count] - weights))
    drop_layers(model, sorted(order[:count]))


def recover(model: Any, stream: TokenStream, steps: int, batch: int, length: int, rate: float, seed: int) -> float:
    """Train the layers of a model, and return the seconds that it took."""
    model.requires_grad_(False)
    layers = stack_of(model)[1]
    parameters = [parameter.requires_grad_(True) for parameter in layers.parameters() if parameter.numel()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    windows = stream.samples(steps * batch, length, seed)
    model.train()
    begin = time.perf_counter()
    for step in tqdm(range(steps), desc="Recovery", disable=None):
        ids = torch.cat(windows[step * batch : (step + 1) * batch])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return time.perf_counter() - begin


def decode(names: dict[str, str], prompt: Tensor, tokens: int) -> dict[str, float]:
    """Return the tokens that each model generates in a second, greedily, with its cache."""
    calls: dict[str, Callable[[], object]] = {}
    for name, path in names.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        calls[name] = partial(model.generate, input_ids=prompt, attention_mask=torch.ones_like(prompt), **length)
    with torch.inference_mode():
        seconds = interleave(calls, 5)
    return {name: round(tokens / statistics.median(each), 2) for name, each in seconds.items()}


class Study:
    """What is measured of one model.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer = load_tokenizer(options.model)
        self.train = TokenStream.of(read_text(options.train), tokenizer)
        test = TokenStream.of(read_text(options.test), tokenizer)
        self.windows = list(test.windows(options.window_length, most=options.windows))
        drawn = self.train.samples(options.samples, options.length, options.seed)
        self.batches = [{"input_ids": ids, "labels": ids} for ids in drawn]
        names = ("fraction", "samples", "steps", "batch", "length", "rate", "windows", "window_length", "seed")
        self.setting = {name: getattr(options, name) for name in names} | {"begins": test.begins}
        run = f"{options.steps} steps of {options.batch} x {options.length}, seed {options.seed}"
        self.key = f"{Path(options.model).name}, {run}"

    def load(self) -> Any:
        """Return the dense model."""
        torch.manual_seed(self.options.seed)
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32).eval()

    def remember(self, name: str, result: dict[str, Any]) -> None:
        """Add results of a method to the file."""
        everything: dict[str, Any] = read_json(self.options.output) or {}
        entry = everything.setdefault(self.key, {"setting": self.setting, "results": {}})
        entry["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        entry["results"].setdefault(name, {}).update(result)
        write_text(self.options.output, json.dumps(everything, indent=2) + "\n")
        print(name, result, flush=True)

    def known(self, name: str) -> dict[str, Any]:
        """Return the results of a method that are in the file."""
        everything: dict[str, Any] = read_json(self.options.output) or {}
        found: dict[str, Any] = everything.get(self.key, {}).get("results", {}).get(name, {})
        return found

    def score(self, model: Any) -> float:
        """Return the perplexity of a model."""
        return round(math.exp(mean_loss(model, self.windows)), 3)

    def dense(self) -> None:
        """Measure the dense model."""
        if not self.known("dense"):
            model = self.load()
            self.remember("dense", {"perplexity": self.score(model), "block_parameters": block_parameters(model)})

    def measure(self, method: str) -> None:
        """Prune by a method, recover, and measure."""
        options, model = self.options, self.load()
        if method == "none":
            pass  # how much of the recovery is that the model gets to know the text
        elif method in WIDTH:
            remove_width(method, options.fraction, model, self.batches)
        else:
            left = [self.known(name)["block_parameters"] for name in WIDTH if self.known(name)]
            if not left:
                raise SystemExit(f"measure one of {', '.join(WIDTH)} first: '{method}' removes as many weights")
            remove_depth(method, self.known("dense")["block_parameters"] - left[0], model, self.batches)
        self.remember(method, {"block_parameters": block_parameters(model), "pruned": self.score(model)})
        if options.steps:
            drawn = (options.steps, options.batch, options.length, options.rate, options.seed)
            seconds = recover(model, self.train, *drawn)
            self.remember(method, {"recovered": self.score(model), "seconds": round(seconds)})
        if options.save:
            model.save_pretrained(options.save / method)

    def decode(self) -> None:
        """Measure how fast the models that were saved generate."""
        folder = self.options.save
        saved = {name: str(folder / name) for name in self.options.methods if (folder / name).is_dir()}
        prompt = self.batches[0]["input_ids"][:, :32]
        for name, speed in decode({"dense": self.options.model, **saved}, prompt, self.options.decode).items():
            self.remember(name, {"tokens_per_second": speed})


def main() -> None:
    """Measure what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=8, help="sequences that importance is measured on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=[*WIDTH, "cosine", "loss", "none"])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--decode", type=int, metavar="TOKENS", help="needs --save")
    study = Study(parser.parse_args())
    study.dense()
    for method in study.options.methods:
        if "recovered" not in study.known(method):
            study.measure(method)
    if study.options.decode and study.options.save:
        study.decode()


if __name__ == "__main__":
    main()
