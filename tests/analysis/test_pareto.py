"""The Pareto front by hand, and the table, page and picture of `hf-sparse compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse.analysis.pareto import is_logarithmic, pareto_figure, pareto_front, plot
from hf_sparse.analysis.results import Result, add_results
from hf_sparse.analysis.runs import Run
from hf_sparse.cli.main import main
from hf_sparse.errors import RecipeError
from hf_sparse.reporting.plotting import describe_figure
from tests.helpers.pages import EVIL, check_page
from tests.helpers.runs import write_run
from tests.helpers.speeds import speed_file


def test_pareto_keeps_equals_and_drops_the_beaten() -> None:
    assert pareto_front([(2, 0.9), (1, 0.5), (2, 0.8), (3, 0.9), (0.5, 0.5), (2, 0.9)]) == [4, 0, 5]
    assert pareto_front([]) == []


def test_compare_draws_what_is_known(dense: Path, sparse: Path, tmp_path: Path, capsys: Any) -> None:
    runs = [
        write_run(tmp_path / EVIL.replace("/", "!"), 0.9),
        write_run(tmp_path / "b", 0.8, {"sparsity": 0.5}, steps=5),
    ]
    for run, model in zip(runs, (dense, sparse), strict=True):
        (Path(run) / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (tmp_path / "bench.json").write_text(json.dumps(speed_file(model=Path(runs[0]).name, against="b")))
    page, picture = tmp_path / "c.html", tmp_path / "c.png"
    command = ["compare", *runs, "--bench", str(tmp_path / "bench.json")]
    assert main([*command, "--html", str(page), "--plot", str(picture)]) == 0
    assert "| 2 | b | magnitude | 0.8000 |" in capsys.readouterr().out
    text = page.read_text()
    check_page(text)
    assert text.count("<svg") == 3
    assert "differ in more than method and seed" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compare_takes_a_file_of_results_with_the_means_over_seeds(tmp_path: Path, capsys: Any) -> None:
    def result(name: str, seed: int, value: float, **more: Any) -> Result:
        facts = {"task": "t", "model": "m", "method": name, "sparsity": 0.0 if name == "dense" else 0.5}
        return Result(name, seed=seed, metrics={"wer": value}, **{**facts, **more})

    results = [
        result("dense", 0, 0.1, bytes=4_000_000),
        result("magnitude", 0, 0.2, bytes=2_000_000, reached=0.5, speed=speed_file(gain=4.0)),
        result("magnitude", 1, 0.4, bytes=2_000_000, reached=0.5),
        result("other", 0, 0.4, bytes=3_000_000, compact_bytes=2_500_000),
    ]
    path, picture = tmp_path / "results.json", tmp_path / "c.png"
    add_results(path, results)
    assert (
        main(["compare", str(path), "--metric", "wer", "--plot", str(picture), "--html", str(tmp_path / "c.html")]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| 1 | dense | dense | 0.1000 | 4.00 | 1.0000 | - | 1.00 |",
        "| 2 | magnitude | magnitude | 0.3000 | 2.00 | 0.5000 | - | 0.25 |",
        "| 3 | other | other | 0.4000 | 2.50 | 0.5000 | - | - |",
    ]
    assert pareto_front([(4.0, 0.1), (2.0, 0.3), (2.5, 0.4)], "wer") == [1, 0]
    first = picture.read_bytes()
    assert main(["compare", str(path), "--metric", "wer", "--plot", str(picture)]) == 0
    assert picture.read_bytes() == first  # the same results, the same picture
    capsys.readouterr()
    assert main(["compare", str(path)]) == 2
    assert "no result has the metric 'accuracy'; known metrics: wer" in capsys.readouterr().err
    add_results(path, [result("else", 0, 0.1, task="u")])
    assert main(["compare", str(path), "--metric", "wer"]) == 2
    assert "several tasks; choose one with --task: t, u" in capsys.readouterr().err
    add_results(path, [result("larger", 0, 0.1, model="n")])
    assert main(["compare", str(path), "--metric", "wer", "--task", "t"]) == 2
    assert "several models; choose one with --model: m, n" in capsys.readouterr().err
    assert main(["compare", str(path), "--metric", "wer", "--task", "t", "--model", "m"]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_axis_of_densities_is_logarithmic_where_ticks_are_in_its_range() -> None:
    assert is_logarithmic("density", [(0.01, 0.8), (0.1, 0.8), (1.0, 0.9)])
    assert not is_logarithmic("density", [(0.0, 0.8), (1.0, 0.8)])
    assert not is_logarithmic("density", [(0.3, 0.8), (0.5, 0.8)])  # a single tick
    assert not is_logarithmic("megabytes", [(0.01, 0.8), (0.1, 0.8), (1.0, 0.9)])


def run(method: str, value: float, **more: Any) -> Run:
    return Run(method, method, more.pop("sparsity", 0.5), 0, value, "", **more)


def test_figure_shows_runs_by_method_with_their_front() -> None:
    runs = [run("a", 0.9, megabytes=4.0), run("b", 0.8, megabytes=2.0), run("c", 0.7, megabytes=3.0)]
    (shown,) = json.loads(describe_figure(pareto_figure(runs, "accuracy")))
    assert shown["x"] == "file size (MB)"
    assert shown["points"] == [["a", [4.0, 0.9]], ["b", [2.0, 0.8]], ["c", [3.0, 0.7]]]
    assert shown["lines"] == [[[2.0, 0.8], [4.0, 0.9]]]
    assert [label for label, _ in shown["labels"]] == ["50 %"] * 3


def test_methods_that_matplotlib_would_hide_or_read_as_formulas_are_drawn(tmp_path: Path) -> None:
    runs = [run("_private", 0.9, megabytes=4.0), run("_$x_{$", 0.8, megabytes=2.0)]
    plot(runs, "accuracy", tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert "_private" in text
    with pytest.raises(RecipeError, match="two runs"):
        plot(runs[:1], "accuracy", tmp_path / "q.svg")
