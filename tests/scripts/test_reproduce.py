"""The plan of the reference results, and the script that runs it, on a model and texts made here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import BertForSequenceClassification

from hf_sparse import RecipeError
from hf_sparse.analysis.results import read_results, write_results
from hf_sparse.formats.inspection import inspect
from hf_sparse.profiling.speed_record import Speed
from hf_sparse.recipe.recipe import Recipe
from scripts.reference import reference, reproduce
from tests.helpers.tiny import save_bert, sentences

RECIPES = Path(__file__).parents[2] / "recipes"
PLAN, ENTRIES = reference.read_plan()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts of every task of the plan, under the names and columns that its recipe has."""
    for task in PLAN["tasks"].values():
        section = yaml.safe_load((RECIPES / task["recipe"]).read_text(encoding="utf-8"))["data"]
        columns = section["text"] if isinstance(section["text"], list) else [section["text"]]
        for split, part in (("train", slice(0, 18)), ("validation", slice(18, None))):
            path = tmp_path / section[split]
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {**dict.fromkeys(columns, text), section["label"]: text if "target" in section["label"] else label}
                for text, label in sentences()[part]
            ]
            path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "data"


def command(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    changes = ["training.max_steps=20", "training.use_cpu=true", "training.disable_tqdm=true", "data.max_length=8"]
    sets = [word for change in changes for word in ("--set", change)]
    models = ["--model", f"l3={tmp_path / 'bert'}", "--model", f"l6={tmp_path / 'bert'}"]
    places = ["--data", str(data), "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words, *places, *models, *sets])
    return reproduce.main()


def test_plan_names_each_result_once_and_every_recipe_of_it_is_one(data: Path, tmp_path: Path) -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) > 90
    save_bert(tmp_path / "bert")
    models = dict.fromkeys(PLAN["models"], tmp_path / "bert")
    machine = reference.Machine(PLAN, ENTRIES, tmp_path / "runs", data, models)
    for entry in ENTRIES:
        recipe = machine.load(entry, 1)
        assert recipe.seed == 1
        asked = {group.sparsity for group in recipe.sparsity.groups} if recipe.sparsity else {0.0}
        own = ":" in entry.method or entry.method == "low rank"  # says itself how much is left
        assert asked == ({None} if own else {entry.sparsity})
        assert entry.needs is None or entry.needs in machine.entries
        assert (recipe.distillation is None) == (entry.teacher is None)


@pytest.mark.parametrize(
    ("name", "recipe", "sparsity"),
    [
        ("sst2-dense", "sst2_dense", 0.0),
        ("sst2-magnitude-90", "sst2_magnitude", 0.9),
        ("sst2-movement-97", "sst2_movement", 0.97),
        ("sst2-soft-movement-97", "sst2_soft_movement", 0.97),
        ("sst2-heads-and-neurons-50", "sst2_heads_neurons", 0.5),
        ("sst2-rigl-90", "sst2_rigl", 0.9),
        ("sst2-low-rank-88-7", "sst2_low_rank", 0.887),
    ],
)
def test_plan_says_the_same_as_the_recipe_of_that_method(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, recipe: str, sparsity: float
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path("models/paraphrase-minilm-l3-v2")
    machine = reference.Machine(PLAN, ENTRIES, tmp_path / "runs", data, {"l3": model})
    changes = [f"training.output_dir={machine.folder(name, 0)}"]
    changes += [f"sparsity.sparsity={sparsity}"] if sparsity in (0.9, 0.97) else []
    other = Recipe.load(RECIPES / f"{recipe}.yaml", changes)
    assert machine.load(machine.entries[name], 0).to_dict() == other.to_dict()


def test_results_are_run_once_and_what_they_need_before_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save_bert(tmp_path / "bert")
    wanted = ("sst2-movement-95-taught-by-l6", "sst2-heads-and-neurons-50-after-dense")
    assert command(tmp_path, data, monkeypatch, *wanted, "--seeds", "0") == 0
    found = {result.name: result for result in read_results(tmp_path / "r.json")}
    assert set(found) == {*wanted, "sst2-dense-l6", "sst2-dense"}
    cut = found[wanted[1]]
    assert (cut.method, cut.sparsity, cut.seed, cut.steps) == ("heads and neurons, after dense", 0.5, 0, 20)
    assert cut.reached == pytest.approx(0.5)
    folder = tmp_path / "runs" / f"{wanted[1]}-0"
    assert cut.bytes == (folder / "model.safetensors").stat().st_size
    assert cut.compact_bytes == sum(inspect(folder / "compact").files.values())
    assert cut.settings is not None
    assert cut.settings["model"]["name"] == cut.model == "paraphrase-minilm-l3-v2"
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert found[wanted[0]].method == "movement, taught by l6"
    assert 0 <= found["sst2-dense"].metrics["accuracy"] <= 1
    assert set(found["sst2-dense"].metrics) == {"accuracy"}
    capsys.readouterr()

    def refused(recipe: Recipe, **_: Any) -> None:
        raise RecipeError("nothing is left to train")

    monkeypatch.setattr(reproduce, "run", refused)
    assert command(tmp_path, data, monkeypatch, *wanted, "--seeds", "0") == 0
    assert capsys.readouterr().out.count("there already") == 2
    before = (tmp_path / "r.json").read_text()
    (tmp_path / "r.json").unlink()  # the folders are still there
    assert command(tmp_path, data, monkeypatch, "sst2-dense*", *wanted, "--seeds", "0") == 1
    assert "sst2-dense-after-dense seed 0: failed" in capsys.readouterr().out
    assert (tmp_path / "r.json").read_text() == before

    monkeypatch.setattr(reproduce, "BENCH", {"batch": 1, "length": 4, "rounds": 2})
    assert command(tmp_path, data, monkeypatch, "--bench", wanted[1], "sst2-dense-after-dense", "--seeds", "0") == 1
    out = capsys.readouterr().out
    assert "no finished run of sst2-dense-after-dense" in out
    assert f"{wanted[1]} seed 0: failed" not in out
    (timed,) = [result for result in read_results(tmp_path / "r.json") if result.speed]
    assert dataclasses.replace(timed, speed=None) == cut
    speed = Speed.from_dict(timed.speed)
    assert (speed.model, speed.against, speed.batch) == ("compact", "sst2-dense-0", 1)
    assert speed.sparse_bytes < speed.dense_bytes

    monkeypatch.setattr(
        sys, "argv", [*["reproduce.py", "--take"], str(tmp_path / "r.json"), "--results", str(tmp_path / "s.json")]
    )
    assert reproduce.main() == 0
    assert read_results(tmp_path / "s.json") == read_results(tmp_path / "r.json")
    write_results(tmp_path / "r.json", [cut])  # as it was before it was timed
    assert reproduce.main() == 0
    assert timed in read_results(tmp_path / "s.json")


def test_g2p_model_is_made_where_there_is_none(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_step = ("--set", "training.max_steps=1")
    assert command(tmp_path, data, monkeypatch, "g2p-dense-2400-steps", "--seeds", "0", *one_step) == 0
    (result,) = read_results(tmp_path / "r.json")
    assert set(result.metrics) == {"wer", "exact_match"}
    assert result.model == "t5-g2p"
    assert (tmp_path / "runs" / "models" / "t5-g2p" / "model.safetensors").is_file()


def test_list_shows_what_is_missing_and_commands(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command(tmp_path, data, monkeypatch, "--list") == 0
    out = capsys.readouterr().out
    assert "sst2-dense: seed 0 missing, 1 missing, 2 missing" in out
    assert len(out.splitlines()) == len(ENTRIES)
    assert command(tmp_path, data, monkeypatch, "--list", "sst2-2-4-50", "--seeds", "7") == 0
    out = capsys.readouterr().out
    assert out.startswith("hf-sparse train recipes/sst2_dense.yaml --output ")
    assert "seed=7" in out
    with pytest.raises(SystemExit):
        command(tmp_path, data, monkeypatch, "nothing")
    assert "no result 'nothing'" in capsys.readouterr().err


def test_words_that_mean_nothing_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for words, said in ((("--take", "none.json"), "there is no file none.json"), (("--seeds", "a"), "not 'a'")):
        with pytest.raises(SystemExit):
            command(tmp_path, data, monkeypatch, *words)
        assert said in capsys.readouterr().err


def test_recipe_that_was_written_in_part_is_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("of an earlier run")
    for text in ("", "model: {name", "model: {name: a, shape: round}\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert not reproduce._finished(tmp_path, Recipe.from_dict({"model": "m", "data": {"name": "d"}}))


def test_low_rank_reaches_the_part_of_the_values_that_it_leaves_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bert(tmp_path / "bert")
    one = "sparsity={compress: {name: low_rank, rank: 1, weighted: false}}"
    assert command(tmp_path, data, monkeypatch, "sst2-low-rank-88-7", "--seeds", "0", "--set", one) == 0
    (result,) = read_results(tmp_path / "r.json")
    layers = BertForSequenceClassification.from_pretrained(tmp_path / "bert").bert.encoder.layer
    shapes = [layer.weight.shape for layer in layers.modules() if isinstance(layer, torch.nn.Linear)]
    assert result.reached == pytest.approx(1 - sum(a + b for a, b in shapes) / sum(a * b for a, b in shapes))
