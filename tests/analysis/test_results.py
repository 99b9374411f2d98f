"""Files of results: read strictly, added to by several processes, never half written."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from hf_sparse import RecipeError
from hf_sparse.analysis.results import Result, add_results, dense_baseline, read_results

FACTS: dict[str, Any] = {
    "name": "sst2-magnitude-90", "task": "sst2", "model": "m", "method": "magnitude", "sparsity": 0.9, "seed": 0,
    "metrics": {"accuracy": 0.75},
}  # fmt: skip


def test_results_come_back_as_they_were_and_one_takes_the_place_of_its_elder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    assert read_results(path) == []
    first = Result.from_dict({**FACTS, "seed": 1, "bytes": 5, "settings": {"seed": 1}})
    add_results(path, [first])
    add_results(path, [Result.from_dict(FACTS), Result.from_dict({**FACTS, "metrics": {"accuracy": 0.5}})])
    assert read_results(path) == [Result.from_dict({**FACTS, "metrics": {"accuracy": 0.5}}), first]
    assert json.loads(path.read_text())[0] == {**FACTS, "metrics": {"accuracy": 0.5}}
    assert len(path.read_text().splitlines()) == 4


def add_ten(path: Path, begin: int) -> None:
    for seed in range(begin, begin + 10):
        add_results(path, [Result.from_dict({**FACTS, "seed": seed})])


def test_processes_that_add_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_ten, args=(tmp_path / "r.json", begin)) for begin in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [result.seed for result in read_results(tmp_path / "r.json")] == list(range(30))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sparcity": 0.5}, "did you mean 'sparsity'"),
        ({"metrics": {"accuracy": "high"}}, "`metrics` must be a mapping of names to numbers"),
        ({"metrics": {}}, "`metrics` must be a mapping of names to numbers"),
        ({"seed": None}, "`seed` must be a number, got None"),
        ({"reached": float("nan")}, "`reached` must be a number"),
        ({"method": ""}, "`method` of a result must be a string"),
    ],
)
def test_what_is_no_result_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Result.from_dict({**FACTS, **change})


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text, reason in (
        ("{}", "must be a list"),
        ("[", "cannot read"),
        ("[3]", "a mapping"),
        ("[{}]", "must have name, task"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=reason):
            read_results(path)
    path.write_text(json.dumps([FACTS, FACTS]))
    with pytest.raises(RecipeError, match="seed 0 twice"):
        read_results(path)


def test_result_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    add_results(path, [Result.from_dict(FACTS)])
    bad = Result(**{**FACTS, "seed": 7, "metrics": {"accuracy": float("nan")}})
    with pytest.raises(RecipeError, match="`metrics` must be a mapping of names to numbers"):
        add_results(path, [bad])
    assert read_results(path) == [Result.from_dict(FACTS)]


def test_dense_baseline_is_the_named_run_or_began_alike_or_took_the_most_steps() -> None:
    def made(name: str, model: str, steps: int, method: str = "dense", sparsity: float = 0.0) -> Result:
        return Result(name, "rte", model, method, sparsity, 0, {"accuracy": 0.5}, steps=steps)

    dense = [
        made("rte-dense", "l3", 1400),
        made("rte-dense-l6", "l6", 1400),
        made("rte-dense-l6-700-steps", "l6", 700),
        made("rte-dense-l6-after-dense-700-steps", "l6", 700, "dense, after dense"),
    ]

    def baselines(model: str, steps: int, method: str) -> list[str]:
        return [run.name for run in dense_baseline(dense, made("rte-x", model, steps, method, 0.9))]

    assert baselines("l3", 1400, "magnitude") == ["rte-dense"]
    assert baselines("l6", 700, "magnitude") == ["rte-dense-l6-700-steps"]
    assert baselines("l6", 700, "magnitude, after dense") == ["rte-dense-l6-after-dense-700-steps"]
    assert baselines("l6", 5600, "magnitude") == ["rte-dense-l6"]
    assert baselines("l3", 1400, "magnitude, after dense") == ["rte-dense"]
    assert baselines("t5", 1400, "magnitude") == []
    named = dataclasses.replace(made("rte-x", "l6", 700, "magnitude", 0.9), baseline="rte-dense-l6")
    assert [run.name for run in dense_baseline(dense, named)] == ["rte-dense-l6"]
    gone = dataclasses.replace(named, baseline="rte-dense-of-another-file")
    assert [run.name for run in dense_baseline(dense, gone)] == ["rte-dense-l6-700-steps"]
    assert Result.from_dict(json.loads(json.dumps(named.to_dict()))) == named
