"""The tasks embedding and reranking, from a recipe to a folder that sentence-transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_sparse.errors import RecipeError
from hf_sparse.formats.inspection import inspect
from hf_sparse.recipe.cache_teacher import teach
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from tests.helpers import tiny
from tests.helpers.sentence import TEXTS, cross_encoder, package, sentence_transformer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(path: Path) -> str:
    """Pairs whose score says whether both have a good word, or both a bad one."""
    rows = tiny.sentences()
    found = [
        {"one": a, "two": b, "score": 5.0 if x == y else 1.0}
        for (a, x), (b, y) in zip(rows, rows[5:] + rows[:5], strict=True)
    ]
    return write(path, found)


def recipe_of(folder: Path, task: str, **changes: Any) -> Recipe:
    training: dict[str, Any] = {
        "output_dir": str(folder / "out"), "use_cpu": True, "max_steps": 6, "report_to": [], "save_strategy": "no",
        "per_device_train_batch_size": 4, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 3,
        "logging_steps": 1, **changes.pop("training", {}),
    }  # fmt: skip
    data = {
        "validation": pairs(folder / "validation.jsonl"),
        "validation_text": ["one", "two"],
        "label": "score",
        "max_length": 12,
    }
    sparsity = {"sparsity": 0.5, "schedule": {"name": "linear", "begin": 0.0, "end": 0.5}}
    if task == "embedding":
        model = sentence_transformer(folder)
        data |= {"train": write(folder / "train.jsonl", [{"text": text} for text in TEXTS]), "text": "text"}
        more: dict[str, Any] = {"distillation": {"teacher": "self", "task_weight": 0.0}}
    else:
        model = cross_encoder(folder)
        data |= {"train": pairs(folder / "train.jsonl"), "text": ["one", "two"]}
        more = {}
    model.save_pretrained(str(folder / "model"))
    whole = {
        "model": {"name": str(folder / "model"), "task": task, "dropout": 0.0},
        "data": {**data, **changes.pop("data", {})},
        "metric": ["spearman", "ndcg@10"],
        "sparsity": sparsity,
        "training": training,
        **more,
        **changes,
    }
    return Recipe.from_dict(whole)


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_recipe_trains_measures_and_saves_what_sentence_transformers_loads(task: str, tmp_path: Path) -> None:
    st = package()
    result = run(recipe_of(tmp_path, task))
    assert {"eval_spearman", "eval_ndcg@10"} <= result.metrics.keys()
    assert result.summary.sparsity == pytest.approx(0.5, abs=1e-3)
    out = tmp_path / "out"
    assert inspect(out).packed
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Sparsity" in card
    assert "sentence-transformers" in card
    kind = st.SentenceTransformer if task == "embedding" else st.CrossEncoder
    loaded = kind(str(out), device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    if task == "embedding":
        from sentence_transformers.util import pairwise_cos_sim

        scores = pairwise_cos_sim(*(loaded.encode([row[key] for row in rows]) for key in ("one", "two"))).numpy()
    else:
        scores = loaded.predict([(row["one"], row["two"]) for row in rows])
    from scipy.stats import spearmanr

    truth = np.array([row["score"] for row in rows])
    assert result.metrics["eval_spearman"] == pytest.approx(spearmanr(scores, truth).statistic, abs=1e-4)


def test_a_cached_teacher_says_what_the_teacher_says(tmp_path: Path) -> None:
    taught = {"teacher": "self", "task_weight": 0.0}
    recipe = recipe_of(tmp_path, "embedding", distillation=taught)
    assert teach(recipe, tmp_path / "cache").examples == len(set(TEXTS))
    found = []
    for name, cache in (("live", None), ("cached", str(tmp_path / "cache"))):
        training = {"output_dir": str(tmp_path / name)}
        run(recipe_of(tmp_path, "embedding", distillation={**taught, "cache": cache}, training=training))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        found.append([log["loss"] for log in state["log_history"] if "loss" in log])
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_neighbours_are_measured_on_labelled_sentences(tmp_path: Path) -> None:
    labelled = write(tmp_path / "labelled.jsonl", [{"text": text, "class": label} for text, label in tiny.sentences()])
    data = {"validation": labelled, "reference": labelled, "validation_text": "text", "label": "class"}
    result = run(recipe_of(tmp_path, "embedding", data=data, metric="knn_accuracy"))
    assert 0.0 <= result.metrics["eval_knn_accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": None}, "learns from a teacher, without labels"),
        ({"distillation": {"teacher": "self"}}, "task_weight: 0"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'; did you mean 'knn_accuracy'"),
        ({"metric": ["spearman", "knn_accuracy"]}, "knn_accuracy is measured on single sentences"),
        ({"data": {"validation_text": "one"}}, "data.validation_text must be two columns, got one"),
        ({"data": {"label": "one"}}, "must be another column than `data.validation_text`"),
        ({"data": {"candidates": 0}}, "`data.candidates` must be a positive integer"),
    ],
)
def test_recipe_that_cannot_be_is_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(recipe_of(tmp_path, "embedding", **changes))


def test_other_tasks_have_no_use_for_the_keys_of_these(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.candidates is for the tasks embedding and reranking"):
        Recipe.from_dict({"model": "m", "data": {"train": "a.jsonl", "validation": "b.jsonl", "candidates": 3}})
