"""The reference results of all-MiniLM-L6-v2: pruned, distilled from itself, measured on STS-B and bbc-news.

    python scripts/reference/embedding.py run e80_s0 --work out
    python scripts/reference/embedding.py measure models/all-MiniLM-L6-v2 out/e80_s0 --data data --work out
    python scripts/reference/embedding.py collect --work out --output recipes/reference/embedding.json

The folder that it is started in has models/all-MiniLM-L6-v2, data/ and out/sentences, as the recipes say. `run` prunes
with the sentences that its seed draws and trains with the recipe; RUNS lists all, and --steps shortens them. `measure`
gives, with the weights in fp32 and in int8, the correlations on STS-B validation, and the accuracy on bbc-news
validation of the 10 nearest training articles, each cut at 64 tokens, by the embedding alone; of a reranker, the
metrics of its recipe, on pairs of which no sentence was trained on. `collect` reads the folders of runs: what each
scored at the end and on the way, and measured.

Runs and their folders have been made with this script, but for e80_*, e90_s0, 4x1_80 and hn50: those were made step by
step with the same settings. The one-shot model of 4x1_80 drew from all sentences: it does not come again to the digit.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from pathlib import Path
from typing import Any

from hf_sparse import BackendError, SparsityConfig, compact, sparsify, summarize, to_runtime
from hf_sparse.hf.embedding.pooling import load_sentence_transformer
from hf_sparse.profiling.machine import machine
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.sections import DataSection
from hf_sparse.recipe.sentence_data import load_sentences
from hf_sparse.recipe.sentence_evaluation import embedding_metrics, reranking_metrics
from hf_sparse.recipe.train import run
from hf_sparse.utils.atomic_io import read_json, write_text

DENSE = "models/all-MiniLM-L6-v2"
SENTENCES = "out/sentences/sentences.jsonl"
PAIRED = "data/stsb/train.jsonl"
UNSEEN = "out/sentences/unseen_pairs.jsonl"
"""Pairs of STS-B, validation, of which no sentence is in PAIRED."""
PAIRS = 400
"""Of them, that rerankers are measured on, each query with 20 candidates more; all take longer than training."""
FEWER = [f"data.validation_samples={PAIRS}"]
RERANKER = "rerank_dense"
GENTLE = 1e-3
"""Learning rate where half of the weights are pruned, and one shot alone costs little."""


def element(sparsity: float, steps: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return the settings of unstructured pruning in one shot."""
    return {"pattern": "element", "sparsity": sparsity, "drawn": 1024, "steps": steps, "seed": seed, **more}


def reranker(name: str, teacher: Path) -> list[str]:
    """Return the changes of the recipe for the dense reranker, or for one that is pruned and distilled from it."""
    if name == RERANKER:
        return ["distillation=null", f"model.name={DENSE}", "training.learning_rate=2e-4"]
    return [f"distillation.teacher={teacher}"]


def blocks(sparsity: float, steps: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return the settings of blocks of four outputs, pruned in one shot."""
    return {**element(sparsity, steps, seed), "pattern": {"name": "block", "rows": 4, "cols": 1}, "drawn": 2048, **more}


def heads_neurons(share: float) -> dict[str, Any]:
    """Return the settings where a share of the heads and of the neurons goes."""
    changes = [f"sparsity.groups.{group}.sparsity={share}" for group in range(2)]
    return {"recipe": "embed_minilm_heads_neurons", "steps": 260, "seed": 0, "changes": changes}


def hybrid(attention: float, neurons: float) -> dict[str, Any]:
    """Return the settings of 4x1 blocks in attention, a third of an encoder's weights, and whole neurons."""
    changes = [f"sparsity.groups.0.sparsity={attention}", f"sparsity.groups.1.sparsity={neurons}"]
    return {"recipe": "embed_minilm_hybrid", "steps": 260, "seed": 0, "changes": changes}


RUNS: dict[str, dict[str, Any]] = {
    "e50": element(0.5, 80, rate=GENTLE),
    "e70": element(0.7, 120),
    **{f"e80_s{seed}": element(0.8, 240, seed) for seed in range(3)},
    **{f"e90_s{seed}": element(0.9, 300, seed) for seed in range(3)},
    "4x1_50": blocks(0.5, 80, rate=GENTLE),
    "4x1_70": blocks(0.7, 160),
    "4x1_80": blocks(0.8, 500),
    **{f"4x1_80_s{seed}": blocks(0.8, 500, seed) for seed in (1, 2)},
    "4x1_90": blocks(0.9, 300),
    "2_4": {"pattern": "2:4", "drawn": 1024, "steps": 160, "seed": 0, "rate": GENTLE},
    "hn50": {"recipe": "embed_minilm_heads_neurons", "steps": 260, "seed": 0},
    **{f"hn50_s{seed}": {"recipe": "embed_minilm_heads_neurons", "steps": 260, "seed": seed} for seed in (1, 2)},
    **{f"hn{percent}": heads_neurons(percent / 100) for percent in (70, 80, 90)},
    "hybrid50": hybrid(0.7, 0.4),
    "hybrid60": {"recipe": "embed_minilm_hybrid", "steps": 260, "seed": 0},
    "hybrid70": hybrid(0.8, 0.65),
    "hybrid80": hybrid(0.9, 0.75),
    "hybrid90": hybrid(0.9, 0.9),
    RERANKER: {"recipe": "rerank_stsb", "steps": 180, "seed": 0, "changes": FEWER},
    "rerank_e80": element(0.8, 360, recipe="rerank_stsb", start=RERANKER, changes=FEWER),
    "rerank_4x1_80": blocks(0.8, 360, recipe="rerank_stsb", start=RERANKER, changes=FEWER),
}  # fmt: skip
"""Pattern and sparsity, sentences that SparseGPT sees, steps; or the recipe that prunes during training.

Rerankers are trained on STS-B; the sparse ones are pruned from the dense one, and distilled from it.
hn and hybrid with the share of all weights of the encoder that goes.
"""
RECIPES = Path(__file__).parents[2] / "recipes"
MEASURED = "measured.json"
TOKENS = 64
"""Of each article of bbc-news."""
FORMS = {"fp32": "cpu", "int8": "cpu-int8"}


def prune(output: Path, start: str, pattern: Any, drawn: int, seed: int, sparsity: float | None = None) -> None:
    """Write the model after one-shot pruning, of what is left where it was pruned before."""
    pairs = is_reranker(start)
    model = load_sentence_transformer(start, "CrossEncoder" if pairs else "SentenceTransformer", device="cpu")
    compact(model[0].model)
    rows = [json.loads(line) for line in Path(PAIRED if pairs else SENTENCES).read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(rows)  # noqa: S311  a sample, no secret
    columns = ("sentence1", "sentence2") if pairs else ("text",)
    texts = sorted(([row[column] for column in columns] for row in rows[:drawn]), key=lambda each: len("".join(each)))
    options = {"truncation": True, "max_length": 96 if pairs else 64, "padding": True, "return_tensors": "pt"}
    batches = [
        dict(model.tokenizer(*(list(column) for column in zip(*texts[i : i + 64], strict=True)), **options))
        for i in range(0, len(texts), 64)
    ]
    given: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    sparsify(model[0].model, SparsityConfig(scorer="sparsegpt", pattern=pattern, **given), batches)
    model.save_pretrained(str(output))


def train(work: Path, name: str, most: int | None = None) -> None:
    """Train one run into its folder.

    Args:
        most: steps, if fewer than the run has.
    """
    setting = RUNS[name]
    steps = min(setting["steps"], most or setting["steps"])
    changes = [f"training.output_dir={work / name}", f"training.max_steps={steps}", f"seed={setting['seed']}"]
    changes += ["training.bf16=true", "training.use_cpu=true", *setting.get("changes", [])]
    if "rate" in setting:
        changes.append(f"training.learning_rate={setting['rate']}")
    if setting.get("recipe") == "rerank_stsb":
        changes += reranker(name, work / RERANKER)
    if "pattern" in setting:
        start = str(work / setting["start"]) if "start" in setting else DENSE
        one_shot = {key: setting[key] for key in ("pattern", "drawn", "seed", "sparsity") if key in setting}
        prune(work / f"{name}_pruned", start, **one_shot)
        changes.append(f"model.name={work / f'{name}_pruned'}")
    recipe = Recipe.load(RECIPES / f"{setting.get('recipe', 'embed_minilm')}.yaml", changes)
    print(name, run(recipe).metrics, flush=True)


def measure(folders: list[str], data: Path, work: Path) -> None:
    """Measure models, and write what is found beside each; of the dense one, into the work folder."""
    for folder in folders:
        one = measured_reranker if is_reranker(folder) else measured_embedding
        found = {form: one(folder, data, backend) for form, backend in FORMS.items()}
        print(folder, found, flush=True)
        target = work if folder.rstrip("/") == DENSE else Path(folder)
        write_text(target / MEASURED, json.dumps(found) + "\n")


def is_reranker(folder: str) -> bool:
    """Return whether a saved model gives scores of pairs."""
    architectures = (read_json(Path(folder) / "config.json") or {}).get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def has_form(model: Any, backend: str) -> bool:
    """Pack a model for a form of weights; return whether it is of that form now: a dense one has no int8 here."""
    try:
        to_runtime(model, backend)
    except BackendError:
        return backend == FORMS["fp32"]
    return True


def measured_embedding(folder: str, data: Path, backend: str) -> dict[str, float] | None:
    """Return the metrics of an embedding model; None if it has no such form."""
    model = load_sentence_transformer(folder, device="cpu")
    if not has_form(model, backend):
        return None
    encode = functools.partial(model.encode, batch_size=64, show_progress_bar=False)
    wanted = ["spearman", "pearson"]
    found = embedding_metrics(encode, load_sentences(pairs(data), wanted, labelled=False), wanted)
    model.max_seq_length = TOKENS
    train = str(data / "bbc-news/train.jsonl")
    news = DataSection(train=train, reference=train, validation=str(data / "bbc-news/validation.jsonl"))
    return found | embedding_metrics(encode, load_sentences(news, ["knn_accuracy"], labelled=False), ["knn_accuracy"])


def measured_reranker(folder: str, data: Path, backend: str) -> dict[str, float] | None:
    """Return the metrics of a reranker; None if it has no such form."""
    model = load_sentence_transformer(folder, "CrossEncoder", device="cpu")
    if not has_form(model, backend):
        return None
    score = functools.partial(model.predict, batch_size=64, show_progress_bar=False)
    section = pairs(data, UNSEEN, PAIRS)
    wanted = ["spearman", "pearson", "ndcg@10", "mrr@10"]
    return reranking_metrics(score, load_sentences(section, wanted, labelled=False), wanted, section.candidates)


def pairs(data: Path, measured: str | None = None, samples: int | None = None) -> DataSection:
    """Return pairs of STS-B, validation if no other file is named, with the candidates of the reranking recipe."""
    return DataSection(
        train=str(data / "stsb/train.jsonl"),
        validation=measured or str(data / "stsb/validation.jsonl"),
        text=["sentence1", "sentence2"],
        candidates=20,
        validation_samples=samples,
    )


def collect(work: Path) -> dict[str, Any]:
    """Return what the folders of runs hold."""
    rows = {}
    for name, setting in RUNS.items():
        final = read_json(work / name / "eval_results.json")
        if final is None:
            continue
        history = (read_json(work / name / "trainer_state.json") or {})["log_history"]
        kind = "CrossEncoder" if is_reranker(str(work / name)) else "SentenceTransformer"
        model = load_sentence_transformer(str(work / name), kind, device="cpu")
        rows[name] = {
            **setting,
            **{key.removeprefix("eval_"): round(final[key], 4) for key in final if key.split("_")[-1] in WANTED},
            "zeros": round(summarize(model[0].model).sparsity, 4),
            "curve": {row["step"]: round(row["eval_spearman"], 4) for row in history if "eval_spearman" in row},
            "loss": {row["step"]: round(row["loss"], 4) for row in history if "loss" in row},
            "measured": read_json(work / name / MEASURED),
            "one_shot": ((read_json(work / f"{name}_pruned" / MEASURED) or {}).get("fp32") or {}).get("spearman"),
        }
    return {"machine": machine(), "dense": (read_json(work / MEASURED) or {}).get("fp32"), "runs": rows}


WANTED = ("spearman", "pearson", "ndcg@10", "mrr@10")


def main() -> None:
    """Do what is requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run")
    one.add_argument("names", nargs="+", choices=RUNS)
    one.add_argument("--steps", type=int, help="at most, to try the path")
    two = verbs.add_parser("measure")
    two.add_argument("folders", nargs="+")
    two.add_argument("--data", type=Path, default=Path("data"))
    three = verbs.add_parser("collect")
    three.add_argument("--output", type=Path, required=True)
    for each in (one, two, three):
        each.add_argument("--work", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.verb == "run":
        for name in options.names:
            train(options.work, name, options.steps)
    elif options.verb == "measure":
        measure(options.folders, options.data, options.work)
    else:
        write_text(options.output, json.dumps(collect(options.work), indent=1) + "\n")


if __name__ == "__main__":
    main()
