"""The reference results of all-MiniLM-L6-v2: one-shot pruning, distillation from itself, STS-B and bbc-news.

    python scripts/reference/embedding.py run e80_s0 --work out
    python scripts/reference/embedding.py knn models/all-MiniLM-L6-v2 out/e80_s0 --data data --work out
    python scripts/reference/embedding.py collect --work out --output recipes/reference/embedding.json

The folder that it is started in has models/all-MiniLM-L6-v2, data/ and out/sentences, as the recipes say. `run` prunes
with the sentences that its seed draws and trains with the recipe; RUNS lists all. `knn` gives the accuracy on bbc-news
validation of the 10 nearest training articles, each cut at 64 tokens, by the embedding alone. `collect` reads the
folders of runs: what each scored at the end and on the way, and its kNN accuracy.

The committed results were made step by step, with the same settings and `hf-sparse train`; `run` as a whole has not
been run on the real model. The one-shot model of 4x1_80 drew from all sentences: it does not come again to the digit.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from pathlib import Path
from typing import Any

from hf_sparse import SparsityConfig, sparsify, summarize
from hf_sparse.hf.embedding.pooling import load_sentence_transformer
from hf_sparse.profiling.machine import machine
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.sections import DataSection
from hf_sparse.recipe.sentence_data import load_sentences
from hf_sparse.recipe.sentence_evaluation import embedding_metrics
from hf_sparse.recipe.train import run
from hf_sparse.utils.atomic_io import read_json, write_text

DENSE = "models/all-MiniLM-L6-v2"
SENTENCES = "out/sentences/sentences.jsonl"
BLOCK = {"name": "block", "rows": 4, "cols": 1}
RUNS: dict[str, dict[str, Any]] = {
    **{
        f"e80_s{seed}": {"pattern": "element", "sparsity": 0.8, "drawn": 1024, "steps": 240, "seed": seed}
        for seed in range(3)
    },
    "e90_s0": {"pattern": "element", "sparsity": 0.9, "drawn": 1024, "steps": 300, "seed": 0},
    "4x1_80": {"pattern": BLOCK, "sparsity": 0.8, "drawn": 2048, "steps": 500, "seed": 0},
    "2_4": {"pattern": "2:4", "drawn": 1024, "steps": 120, "seed": 0},
    "hn50": {"recipe": "embed_minilm_heads_neurons", "steps": 260, "seed": 0},
}
"""Pattern and sparsity, sentences that SparseGPT sees, steps; or the recipe that prunes during training."""
RECIPES = Path(__file__).parents[2] / "recipes"
KNN = "bbc_knn.json"
TOKENS = 64
"""Of each article of bbc-news."""


def prune(output: Path, pattern: Any, drawn: int, seed: int, sparsity: float | None = None) -> None:
    """Write the model after one-shot pruning."""
    model = load_sentence_transformer(DENSE, device="cpu")
    texts = [json.loads(line)["text"] for line in Path(SENTENCES).read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(texts)  # noqa: S311  a sample, no secret
    texts = sorted(texts[:drawn], key=len)
    options = {"truncation": True, "max_length": 64, "padding": True, "return_tensors": "pt"}
    batches = [dict(model.tokenizer(texts[i : i + 64], **options)) for i in range(0, drawn, 64)]
    given: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    sparsify(model[0].model, SparsityConfig(scorer="sparsegpt", pattern=pattern, **given), batches)
    model.save_pretrained(str(output))


def train(work: Path, name: str, steps: int, seed: int, recipe: str = "embed_minilm", **pruning: Any) -> None:
    """Train one run into its folder."""
    changes = [f"training.output_dir={work / name}", f"training.max_steps={steps}", f"seed={seed}"]
    changes += ["training.bf16=true", "training.use_cpu=true"]
    if pruning:
        prune(work / f"{name}_pruned", seed=seed, **pruning)
        changes.append(f"model.name={work / f'{name}_pruned'}")
    print(run(Recipe.load(RECIPES / f"{recipe}.yaml", changes)).metrics)


def knn(folders: list[str], data: Path, work: Path) -> None:
    """Measure the neighbours on bbc-news, and write them beside each model; of the dense one, into the work folder."""
    section = DataSection(
        train=str(data / "bbc-news/train.jsonl"),
        reference=str(data / "bbc-news/train.jsonl"),
        validation=str(data / "bbc-news/validation.jsonl"),
    )
    examples = load_sentences(section, ["knn_accuracy"], labelled=False)
    for folder in folders:
        model = load_sentence_transformer(folder, device="cpu")
        model.max_seq_length = TOKENS
        encode = functools.partial(model.encode, batch_size=64, show_progress_bar=False)
        found = embedding_metrics(encode, examples, ["knn_accuracy"])
        print(folder, found, flush=True)
        target = work if folder.rstrip("/") == DENSE else Path(folder)
        write_text(target / KNN, json.dumps(found) + "\n")


def collect(work: Path) -> dict[str, Any]:
    """Return what the folders of runs hold."""
    rows = {}
    for name, setting in RUNS.items():
        final = read_json(work / name / "eval_results.json")
        if final is None:
            continue
        history = (read_json(work / name / "trainer_state.json") or {})["log_history"]
        model = load_sentence_transformer(str(work / name), device="cpu")
        rows[name] = {
            **setting,
            "spearman": round(final["eval_spearman"], 4),
            "pearson": round(final["eval_pearson"], 4),
            "zeros": round(summarize(model[0].model).sparsity, 4),
            "curve": {row["step"]: round(row["eval_spearman"], 4) for row in history if "eval_spearman" in row},
            "loss": {row["step"]: round(row["loss"], 4) for row in history if "loss" in row},
            "bbc_knn": (read_json(work / name / KNN) or {}).get("knn_accuracy"),
        }
    return {"machine": machine(), "dense": {"spearman": 0.8672, **(read_json(work / KNN) or {})}, "runs": rows}


def main() -> None:
    """Do what is requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run")
    one.add_argument("names", nargs="+", choices=RUNS)
    two = verbs.add_parser("knn")
    two.add_argument("folders", nargs="+")
    two.add_argument("--data", type=Path, default=Path("data"))
    three = verbs.add_parser("collect")
    three.add_argument("--output", type=Path, required=True)
    for each in (one, two, three):
        each.add_argument("--work", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.verb == "run":
        for name in options.names:
            train(options.work, name, **RUNS[name])
    elif options.verb == "knn":
        knn(options.folders, options.data, options.work)
    else:
        write_text(options.output, json.dumps(collect(options.work), indent=1) + "\n")


if __name__ == "__main__":
    main()
