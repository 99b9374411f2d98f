"""No sentence that is measured is trained on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "reference" / "make_sentences.py"
RECIPES = ROOT / "recipes"
REAL = Path(os.environ.get("HF_SPARSE_DATA", ROOT / "shared" / "data"))


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_sentences", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(folder: Path) -> Path:
    """Data whose training files repeat what is measured, in other spellings."""
    made = script()
    for name, columns in made.TRAIN.items():
        (folder / name).mkdir(parents=True)
        row = dict.fromkeys(columns, f"A sentence of {name} alone. And a second one of {name}.")
        leaks = dict.fromkeys(columns, "a man  is PLAYING, a flute!")
        (folder / name / "train.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(leaks)}\n", encoding="utf-8")
    for name, columns in made.MEASURED.items():
        row = dict.fromkeys(columns, f"A man is playing a flute. Only {name} measures this.")
        (folder / name / "validation.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    return folder


def written(data: Path, output: Path, *more: str) -> tuple[list[str], list[str]]:
    command: list[str | Path] = [sys.executable, SCRIPT, "--data", data, "--output", output, *more]
    subprocess.run(command, check=True, capture_output=True)
    found = []
    for name in ("sentences", "held_out"):
        lines = (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([json.loads(line)["text"] for line in lines])
    return found[0], found[1]


def test_other_spellings_of_what_is_measured_are_left_out(tmp_path: Path) -> None:
    sentences, held_out = written(small(tmp_path / "data"), tmp_path / "out")
    assert "A sentence of sst2 alone." in sentences
    assert not any("flute" in sentence for sentence in sentences)
    assert "A man is playing a flute." in held_out


def test_no_dataset_outweighs_the_others(tmp_path: Path) -> None:
    data = small(tmp_path / "data")
    with (data / "sst2" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"sentence": f"Number {index} of many."}) + "\n" for index in range(50))
    written(data, tmp_path / "out", "--most", "2")
    rows = [json.loads(line) for line in (tmp_path / "out" / "sentences.jsonl").read_text("utf-8").splitlines()]
    sources = [row["source"] for row in rows]
    assert {name: sources.count(name) for name in script().TRAIN} == dict.fromkeys(script().TRAIN, 2)


def test_pairs_with_a_sentence_that_a_reranker_was_trained_on_are_left_out(tmp_path: Path) -> None:
    data = small(tmp_path / "data")
    with (data / "stsb" / "validation.jsonl").open("a", encoding="utf-8") as file:
        for one, two in (
            ("A man is playing a flute", "New."),
            ("New.", "A MAN is playing: a flute!"),
            ("Two.", "Dogs."),
        ):
            file.write(json.dumps({"sentence1": one, "sentence2": two, "label": 1.0}) + "\n")
    rows = script().unseen_pairs(data)
    assert [row["sentence1"] for row in rows] == ["A man is playing a flute. Only stsb measures this.", "Two."]
    assert rows[1] == {"sentence1": "Two.", "sentence2": "Dogs.", "label": 1.0}


def test_recipes_measure_rerankers_on_unseen_pairs_and_train_embeddings_on_unmeasured_sentences() -> None:
    data = {path.stem: yaml.safe_load(path.read_text("utf-8"))["data"] for path in RECIPES.glob("*.yaml")}
    assert data["rerank_stsb"]["validation"] == "out/sentences/unseen_pairs.jsonl"
    for name in ("embed_minilm", "embed_minilm_heads_neurons", "embed_minilm_hybrid"):
        assert data[name]["train"] == "out/sentences/sentences.jsonl"


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the datasets are not on this machine (HF_SPARSE_DATA names their folder)"
)
def test_no_measured_sentence_is_in_the_training_file(tmp_path: Path) -> None:
    key = script().key
    sentences, _ = written(REAL, tmp_path)
    trained = {key(sentence) for sentence in sentences}
    assert len(trained) == len(sentences) > 50_000
    # Read here once more, not from what the script wrote: all columns that recipes and benchmarks measure.
    measured = set()
    for name, columns in {"stsb": ("sentence1", "sentence2"), "bbc-news": ("text",)}.items():
        for line in (REAL / name / "validation.jsonl").read_text(encoding="utf-8").splitlines():
            measured |= {key(json.loads(line)[column]) for column in columns}
    assert len(measured) > 2_000
    assert not trained & measured
    # A reranker trains on the pairs of stsb with their labels.
    lines = (REAL / "stsb" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    paired = {key(json.loads(line)[column]) for line in lines for column in ("sentence1", "sentence2")}
    pairs = [json.loads(line) for line in (tmp_path / "unseen_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) > 1_000
    assert not paired & {key(pair[column]) for pair in pairs for column in ("sentence1", "sentence2")}
