"""Runs from folders and from files of results: read strictly, timed in one setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse import RecipeError
from hf_sparse.analysis.results import Result, add_results
from hf_sparse.analysis.runs import by_seed, read_latency, read_run
from hf_sparse.cli.main import main
from hf_sparse.utils.strict_yaml import parse_yaml
from tests.helpers.runs import write_run
from tests.helpers.speeds import speed_file


def test_compare_names_what_is_missing(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "a", 0.9)
    assert main(["compare", run, "--metric", "f1"]) == 2
    assert "has no metric 'f1'; known metrics: accuracy" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 2
    assert "is not a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["NaN", "null", '"high"', "1" + "0" * 400])
def test_compare_refuses_what_is_no_number(tmp_path: Path, capsys: Any, value: str) -> None:
    run = write_run(tmp_path / "a", 0.9)
    (tmp_path / "a" / "eval_results.json").write_text(f'{{"eval_accuracy": {value}}}')
    assert main(["compare", run]) == 2
    assert "must be a finite number" in capsys.readouterr().err


def test_compare_refuses_a_recipe_without_groups(tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", write_run(tmp_path / "a", 0.9, {"groups": []})]) == 2
    assert "is not a recipe" in capsys.readouterr().err


def test_timings_are_of_their_own_folder_and_not_of_another_with_its_name(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "same", tmp_path / "two" / "same", tmp_path / "dense"]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[0] / "speed.json").write_text(json.dumps(speed_file(model="same", against="dense")))
    assert read_latency(folders) == [4.0, None, 8.0]
    (tmp_path / "bench.json").write_text(json.dumps(speed_file(model="same", against="dense")))
    assert read_latency([folders[1]], [tmp_path / "bench.json"]) == [4.0]
    (folders[0] / "speed.json").unlink()
    with pytest.raises(RecipeError, match="several runs are called same"):
        read_latency(folders, [tmp_path / "bench.json"])


def test_compare_takes_times_of_one_machine_from_a_file_of_results(tmp_path: Path, capsys: Any) -> None:
    facts: dict[str, Any] = {"task": "t", "model": "m", "sparsity": 0.5, "metrics": {"accuracy": 0.5}, "seed": 0}
    machines = {"a": "Box 9", "b": "Box 9", "c": "Another"}
    results = [Result(n, method=n, speed=speed_file(machine=machine), **facts) for n, machine in machines.items()]
    add_results(tmp_path / "r.json", results)
    assert main(["compare", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr()
    assert [line.split("|")[8].strip() for line in said.out.splitlines()[2:]] == ["0.50", "0.50", "-"]
    assert "measured on another machine than most: c\n" in said.err


def test_compare_tells_runs_of_another_length_apart(tmp_path: Path, capsys: Any) -> None:
    facts: dict[str, Any] = {"task": "t", "model": "m", "sparsity": 0.5, "metrics": {"accuracy": 0.5}, "seed": 0}
    lengths = {"a": 1400, "b": 1400, "c": 5600, "d": None}
    results = [Result(name, method="magnitude", steps=steps, **facts) for name, steps in lengths.items()]
    add_results(tmp_path / "r.json", results)
    assert main(["compare", str(tmp_path / "r.json")]) == 0
    rows = {
        (cells := line.split("|"))[2].strip(): cells[3].strip() for line in capsys.readouterr().out.splitlines()[2:]
    }
    assert rows == {"a": "magnitude", "b": "magnitude", "c": "magnitude, 5,600 steps", "d": "magnitude"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("seed: .inf", "must be an integer, got inf"),
        ("seed: 1e400", "too large"),
        ("seed: true", "must be an integer"),
        ("sparsity: {sparsity: .nan}", "must be a finite number, got nan"),
        ("sparsity: {sparsity: 1e999}", "too large"),
        ("sparsity: {sparsity: [1]}", "is not a recipe"),
        ("sparsity: {scorer: {rate: 1}}", "is not a recipe"),
        ("training: 5", "is not a recipe"),
        ("seed: " + "9" * 5000, "a finished run"),
        ("model: " + "[" * 900, "is not a"),
        ("seed: !!int foo", "is not a"),
        ("seed: 2024-99-99", "must be an integer"),
        ("a: &a [1]\nb: [*a, *a]", "is not a"),
        ("}", "is not a finished run"),
    ],
)
def test_recipe_of_a_run_that_was_not_written_by_train_is_an_error(
    tmp_path: Path, capsys: Any, change: str, reason: str
) -> None:
    folder = Path(write_run(tmp_path / "a", 0.9, {"sparsity": 0.9}))
    recipe = parse_yaml((folder / "recipe.yaml").read_text())
    lines = [f"{key}: {json.dumps(value)}" for key, value in recipe.items() if not change.startswith(f"{key}:")]
    (folder / "recipe.yaml").write_text("\n".join([*lines, change]))
    assert main(["compare", str(folder)]) == 2
    assert reason in capsys.readouterr().err


def test_recipe_is_read_as_train_reads_it(tmp_path: Path) -> None:
    folder = Path(write_run(tmp_path / "a", 0.9))
    text = (folder / "recipe.yaml").read_text().replace("sparsity: null", "sparsity: {sparsity: 5e-1, scorer: no}")
    (folder / "recipe.yaml").write_text(text)
    assert (read_run(folder).sparsity, read_run(folder).method) == (0.5, "no")


def test_table_by_seed_has_mean_and_spread(tmp_path: Path) -> None:
    values = {0: 0.8, 1: 0.9}
    runs = [read_run(write_run(tmp_path / f"r{seed}", value, seed=seed)) for seed, value in values.items()]
    runs.append(read_run(write_run(tmp_path / "m", 0.5, {"sparsity": 0.5})))
    assert by_seed(runs, "accuracy").splitlines()[2:] == [
        "| 0% | dense | 0.850 | 2 | 0.800 0.900 | 0.800 - 0.900 |",
        "| 50% | magnitude | 0.500 | 1 | 0.500 | 0.500 - 0.500 |",
    ]
    with pytest.raises(RecipeError, match=r"second run of dense at 0\.0 with seed 0"):
        by_seed([runs[0], runs[0]], "accuracy")
    other = read_run(write_run(tmp_path / "longer", 0.5, steps=11))
    with pytest.raises(RecipeError, match="differ in more than method and seed"):
        by_seed([runs[0], other], "accuracy")
