"""The script of the embedding results, from pruning to the file of results, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.reference import embedding
from tests.helpers.sentence import TEXTS, package, sentence_transformer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder that the script is started in."""
    package()
    monkeypatch.chdir(tmp_path)
    sentence_transformer(tmp_path / "made").save_pretrained(embedding.DENSE)
    pairs = [
        {"sentence1": one, "sentence2": two, "label": float(n % 5)}
        for n, (one, two) in enumerate(zip(TEXTS, TEXTS[5:] + TEXTS[:5], strict=True))
    ]
    news = [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)]
    write = {"stsb": pairs, "bbc-news": news}
    for name, rows in write.items():
        for split in ("train", "validation"):
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentences = tmp_path / embedding.SENTENCES
    sentences.parent.mkdir(parents=True)
    sentences.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / embedding.UNSEEN).write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for setting in embedding.RUNS.values():
        if "drawn" in setting:
            monkeypatch.setitem(setting, "drawn", len(TEXTS))
        monkeypatch.setitem(setting, "changes", [*setting.get("changes", []), "data.max_length=12"])
    return tmp_path


def script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["embedding.py", *arguments])
    embedding.main()


@pytest.mark.slow
def test_runs_are_pruned_trained_measured_and_collected(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["4x1_80", "hn50", "hybrid80", "rerank_dense", "rerank_4x1_80"]
    script(monkeypatch, "run", *names, "--steps", "24")
    folders = [f"out/{name}" for name in (*names, "4x1_80_pruned")]
    script(monkeypatch, "measure", embedding.DENSE, *folders)
    script(monkeypatch, "collect", "--output", "results.json")
    found: dict[str, Any] = json.loads((place / "results.json").read_text())
    assert list(found["runs"]) == names
    assert set(found["dense"]) == {"spearman", "pearson", "knn_accuracy"}
    blocks, heads, both, _, reranker = (found["runs"][name] for name in names)
    assert blocks["zeros"] == pytest.approx(0.8, abs=1e-3)
    # Training evaluates in bfloat16, which processors round differently, and of so few pairs two may change places.
    assert blocks["measured"]["fp32"]["pearson"] == pytest.approx(blocks["pearson"], abs=0.01)
    assert blocks["measured"]["fp32"]["spearman"] == pytest.approx(blocks["spearman"], abs=0.02)
    assert blocks["one_shot"] != blocks["spearman"]
    assert heads["zeros"] == pytest.approx(0.5, abs=0.05)
    assert both["zeros"] == pytest.approx(0.8, abs=0.05)
    assert reranker["zeros"] == pytest.approx(0.8, abs=1e-3)
    assert {"ndcg@10", "mrr@10", "spearman"} <= set(reranker["measured"]["fp32"])
