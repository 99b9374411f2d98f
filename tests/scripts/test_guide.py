"""The committed guide, pictures and results say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_sparse import RecipeError
from hf_sparse.analysis.results import Result, common_machine, read_results
from scripts.reference import make_guide
from scripts.reference.claims import MAIN
from scripts.reference.reference import RESULTS, ROOT, read_plan, reference_results
from tests.helpers.speeds import speed_file


def test_committed_guide_and_pictures_show_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    make_guide.write(tmp_path)
    assert (tmp_path / "GUIDE.md").read_bytes() == (ROOT / "recipes" / "GUIDE.md").read_bytes()
    pictures, committed = (
        sorted((folder / "reference").glob("pareto-*.png")) for folder in (tmp_path, ROOT / "recipes")
    )
    assert [path.name for path in pictures] == [path.name for path in committed]
    for written, kept in zip(pictures, committed, strict=True):
        # What they show, not how this version of matplotlib and its fonts draw it.
        assert image_module.open(kept).text["Description"] == image_module.open(written).text["Description"], kept.name


def test_every_result_is_in_the_guide_and_every_task_has_a_metric() -> None:
    results = read_results(RESULTS)
    text = make_guide.guide(results)
    assert "{{" not in text
    for result in results:
        assert f"../model_cards/{result.name}.md" in text
        assert MAIN[result.task] in result.metrics
    for entry in read_plan()[1]:
        assert entry.task in MAIN


def test_speed_of_the_main_machine_stands_for_a_result_whichever_seed_it_is_of() -> None:
    def timed(name: str, seed: int, machine: str, gain: float) -> Result:
        return Result(name, task="sst2", model="paraphrase-minilm-l3-v2", method="magnitude", sparsity=0.9, seed=seed,
                      metrics={"accuracy": 0.8}, steps=1, speed=speed_file(gain=gain, machine=machine))  # fmt: skip

    old, new = timed("a", 0, "old", 2.0), timed("a", 1, "new", 3.0)
    others = [timed("b", 0, "new", 4.0), timed("c", 0, "new", 6.0), timed("d", 0, "old", 5.0)]
    results = reference_results([old, new, *others])
    assert common_machine(results) == "new"
    assert [bool(result.speed) for result in results] == [False, True, True, True, True]
    table = make_guide.section(results, "sst2")
    assert "3.00x" in table  # although the first seed was not timed
    assert "2.00x" not in table
    assert "5.00x as fast" in table
    assert table.count("on another processor") == 1


def test_each_model_of_a_task_has_a_picture_of_its_own() -> None:
    models = read_plan()[0]["models"]

    def result(name: str, model: str) -> Result:
        return Result(
            name,
            task="mrpc",
            model=models[model],
            method=name,
            sparsity=0.5,
            seed=0,
            metrics={"accuracy": 0.8},
            steps=1,
        )

    known = [result(name, model) for model, names in (("l3", "abc"), ("l6", "defg"), ("t5", "hi")) for name in names]
    drawn = make_guide.pictures(known)
    assert {name: [run.name for run in runs] for name, runs in drawn.items()} == {
        "pareto-mrpc.png": ["a", "b", "c"],
        "pareto-mrpc-l6.png": ["d", "e", "f", "g"],
    }
    assert make_guide.pictures([]) == {}
    text = make_guide.section(known, "mrpc")
    assert [f"](reference/{name})" in text for name in drawn] == [True, True]


def test_guide_that_names_no_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.md").write_text("{{sst2-magic}}")
    monkeypatch.setattr(make_guide, "TEMPLATE", tmp_path / "t.md")
    with pytest.raises(RecipeError, match="must be measured or planned, got 'sst2-magic'"):
        make_guide.guide([])
    (tmp_path / "t.md").write_text("{{sst2-magnitude-50}}")
    assert make_guide.guide([]) == "not measured"


def test_rows_are_those_of_a_file_with_the_range_of_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "reference").mkdir(parents=True)
    monkeypatch.setattr(make_guide, "ROOT", tmp_path)
    (tmp_path / "t.md").write_text("{{rows experts.json method bytes bits}}")
    monkeypatch.setattr(make_guide, "TEMPLATE", tmp_path / "t.md")
    assert make_guide.guide([]) == "Not measured: `scripts/reference/experts.py`."
    rows = [{"method": "a", "bytes": 1000, "bits": [2.0, 3.0]}, {"method": "b", "bytes": 1, "bits": 1.25}]
    (tmp_path / "recipes" / "reference" / "experts.json").write_text(json.dumps({"rows": rows}))
    assert make_guide.guide([]).splitlines()[2:] == ["| a | 1,000 | 2.500 [2.000, 3.000] |", "| b | 1 | 1.250 |"]
    (tmp_path / "t.md").write_text("{{rows other.json method}}")
    with pytest.raises(RecipeError, match=r"must be in experts\.json, .* got 'other\.json'"):
        make_guide.guide([])


def test_tables_have_the_number_of_seeds_and_the_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int, accuracy: float) -> Result:
        return Result("sst2-dense", task="sst2", model="m", method="dense", sparsity=0.0, seed=seed,
                      metrics={"accuracy": accuracy}, steps=1400, bytes=2_500_000)  # fmt: skip

    (tmp_path / "t.md").write_text("{{sst2-dense}}\n{{table sst2-dense sst2-magnitude-50}}\n")
    monkeypatch.setattr(make_guide, "TEMPLATE", tmp_path / "t.md")
    assert make_guide.guide([run(0, 0.8), run(1, 0.9)]).splitlines() == [
        "0.850",
        "| result | steps | seeds | accuracy | dense: accuracy | size, MB | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| [sst2-dense](../model_cards/sst2-dense.md) | 1,400 | 2 | 0.850 [0.800, 0.900] | - | 2.5 | - |",
        "| sst2-magnitude-50 | - | 0 | not measured | - | - | - |",
    ]
    other = Result("g2p-dense", "g2p", "t5", "dense", 0.0, 0, {"wer": 0.1}, 1400)
    with pytest.raises(RecipeError, match="one main metric, got accuracy, wer"):
        make_guide.result_table({"sst2-dense": [run(0, 0.8)], "g2p-dense": [other]}, [])
