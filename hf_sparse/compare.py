"""Many finished runs beside each other: a table over seeds, and which runs no other one beats (Pareto)."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import page
from .drawing import new_figure, write_figure
from .errors import CheckpointError, RecipeError
from .inspection import inspect
from .speed import SPEED, read_speed

COSTS = {"megabytes": "size of the files in MB", "left": "fraction of weights left", "milliseconds": "latency in ms"}
"""What a run costs, by the name of the field of `Run`; lower is better."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: of its folder.
        method: scorers of its recipe, or "dense".
        asked: sparsity of its recipe.
        seed: of its recipe.
        value: of the metric; higher is better.
        setting: all of the recipe beside method, seed and paths, as text.
        megabytes: of its weight files; None where there are none.
        left: fraction of the weights that are not zero, of those asked to be sparse.
        milliseconds: from the timings, if there are some.
    """

    name: str
    method: str
    asked: float
    seed: int
    value: float
    setting: str
    megabytes: float | None = None
    left: float | None = None
    milliseconds: float | None = None


def method_of(recipe: Mapping[str, Any]) -> tuple[str, float]:
    """Return the name of the method and the sparsity that was asked.

    Example:
        >>> method_of({"sparsity": {"groups": [{"scorer": {"name": "movement"}, "sparsity": 0.9}]}})
        ('movement', 0.9)
    """
    section = recipe.get("sparsity")
    if not section:
        return "dense", 0.0
    groups = section.get("groups", [section])
    names = [g.get("scorer", "magnitude") for g in groups]
    scorers = {name if isinstance(name, str) else name["name"] for name in names}
    return "+".join(sorted(scorers)), float(groups[0].get("sparsity") or 0.0)


def setting_of(recipe: Mapping[str, Any]) -> str:
    """Return all that has to be the same in runs whose methods are compared, as text."""
    rest = {key: value for key, value in recipe.items() if key not in ("sparsity", "seed", "model", "data")}
    rest["training"] = {key: value for key, value in rest["training"].items() if key not in ("output_dir", "seed")}
    data = {key: value for key, value in recipe["data"].items() if key not in ("train", "validation")}
    return json.dumps([rest, data, Path(recipe["model"]["name"]).name], sort_keys=True)


def read_run(folder: str | os.PathLike[str], metric: str = "accuracy", milliseconds: float | None = None) -> Run:
    """Read a folder that `hf-sparse train` wrote.

    Args:
        metric: as in `eval_results.json`, without `eval_`.
        milliseconds: see `read_latency`.

    Raises:
        RecipeError: if `recipe.yaml` or `eval_results.json` is missing, cannot be read, or lacks something.
    """
    folder = Path(folder)
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        measured = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        (method, asked), setting, seed = method_of(recipe), setting_of(recipe), int(recipe["seed"])
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{folder} is no finished run of `hf-sparse train`: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{folder}/recipe.yaml is no recipe as `hf-sparse train` writes it: {error!r}") from error
    if f"eval_{metric}" not in measured:
        known = ", ".join(key.removeprefix("eval_") for key in measured)
        raise RecipeError(f"{folder}/eval_results.json has no metric '{metric}'; it has {known}")
    name = folder.resolve().name
    try:
        found = inspect(folder)
    except CheckpointError:  # the results may be kept without the weights
        megabytes = left = None
    else:
        megabytes = sum(found.files.values()) / 1e6
        left = sum(w.nonzeros for w in found.weights) / max(1, sum(w.parameters for w in found.weights))
    return Run(
        name,
        method,
        asked,
        seed,
        float(measured[f"eval_{metric}"]),
        setting,
        megabytes,
        left,
        milliseconds,
    )


def read_latency(
    folders: Sequence[str | os.PathLike[str]], files: Sequence[str | os.PathLike[str]] = ()
) -> list[float | None]:
    """Return the milliseconds of each folder: from the timings beside it, else from those files, by its name.

    A dense model's are also found in the timings of those that were compared with it.

    Raises:
        CheckpointError: if timings are none.
        RecipeError: if they were not measured alike.
    """
    own = {place: read_speed(path) for place, run in enumerate(folders) if (path := Path(run) / SPEED).is_file()}
    speeds = [*(read_speed(path) for path in files), *own.values()]
    settings = list(dict.fromkeys((s.machine, s.threads, s.dtype, s.batch, s.length) for s in speeds))
    if len(settings) > 1:
        raise RecipeError(
            f"these timings cannot be compared, as they were measured with {settings[0]} and {settings[1]}"
        )
    named = {speed.against: speed.dense for speed in speeds} | {speed.model: speed.sparse for speed in speeds}
    found = [
        own[place].sparse if place in own else named.get(Path(run).resolve().name) for place, run in enumerate(folders)
    ]
    return [None if times is None else 1e3 * times[1] for times in found]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of points (cost, value) that no other beats, by rising cost.

    One beats another if it costs no more and is worth no less, and is better in one of the two.

    Example:
        >>> pareto([(1, 0.8), (2, 0.7), (3, 0.9), (3, 0.9)])
        [0, 2, 3]
    """
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1] or points[place] == points[front[-1]]:
            front.append(place)
    return front


def by_seed(runs: Sequence[Run], metric: str) -> str:
    """Return a Markdown table, one row per method and sparsity, with the spread over seeds.

    Raises:
        RecipeError: if recipes differ in more than the sparsity section, the seed and paths, or two have one seed.
    """
    values: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.setting != runs[0].setting:
            raise RecipeError(f"these runs differ in more than method and seed: {runs[0].name} and {run.name}")
        if run.seed in values[run.asked, run.method]:
            raise RecipeError(f"{run.name}: there is another run of {run.method} at {run.asked} with seed {run.seed}")
        values[run.asked, run.method][run.seed] = run.value
    lines = [f"| sparsity | method | {metric} (mean) | per seed | lowest - highest |", "|---|---|---|---|---|"]
    for (sparsity, method), found in sorted(values.items()):
        seeds = [found[seed] for seed in sorted(found)]
        spread = f"{min(seeds):.3f} - {max(seeds):.3f}" if len(seeds) > 1 else "one seed"
        each = " ".join(f"{value:.3f}" for value in seeds)
        lines.append(f"| {sparsity:.0%} | {method} | {statistics.mean(seeds):.3f} | {each} | {spread} |")
    return "\n".join(lines)


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of a table of single runs, numbered as in the plots."""

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        [str(place), run.name, run.method, shown(run.value, 4), shown(run.megabytes, 2), shown(run.left, 4)]
        + [shown(run.milliseconds, 2)]
        for place, run in enumerate(runs, start=1)
    ]


def head(metric: str) -> list[str]:
    """Return the head of the table of `rows`."""
    return ["number", "run", "method", metric, "MB", "left", "ms"]


def _points(runs: Sequence[Run], cost: str) -> tuple[list[int], list[tuple[float, float]]]:
    known = [place for place, run in enumerate(runs) if getattr(run, cost) is not None]
    return known, [(getattr(runs[place], cost), runs[place].value) for place in known]


def compare_page(runs: Sequence[Run], metric: str) -> str:
    """Return the HTML page: one plot for each cost that two runs or more have, and the table."""
    charts, missing = [], []
    for cost, label in COSTS.items():
        known, points = _points(runs, cost)
        if len(known) < 2:
            missing.append(label)
            continue
        picture = page.scatter(points, pareto(points), label, metric, [place + 1 for place in known])
        charts.append(page.figure(picture, f"{metric} by {label}"))
    note = "Numbers are those of the table. The line joins the runs that no other one beats."
    note += f" Left out, as fewer than two runs have it: {', '.join(missing)}." if missing else ""
    parts = [page.section("Pareto plots", f'<div class="grid">{"".join(charts)}</div>', note)]
    if len({run.setting for run in runs}) > 1:
        note = "These runs were not trained alike: their recipes differ in more than method and seed."
    else:
        note = "These runs differ in method and seed only."
    parts.append(page.section("Runs", page.table(head(metric), rows(runs)), note))
    return page.page("Comparison of runs", parts)


def plot(runs: Sequence[Run], metric: str, path: str | os.PathLike[str]) -> None:
    """Draw the Pareto plots and write them to a file (png, pdf or svg by its ending).

    Raises:
        BackendError: without matplotlib.
        RecipeError: for an ending that matplotlib cannot write, or if there is nothing to draw.
    """
    drawn = [cost for cost in COSTS if len(_points(runs, cost)[0]) > 1]
    if not drawn:
        raise RecipeError("a plot needs two runs with weight files, or with timings")
    figure = new_figure(4.5 * len(drawn), 4)
    for axes, cost in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        known, points = _points(runs, cost)
        axes.plot(*zip(*[points[place] for place in pareto(points)], strict=True), color="tab:orange")
        axes.scatter(*zip(*points, strict=True))
        for place, point in zip(known, points, strict=True):
            axes.annotate(runs[place].name, point, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel(COSTS[cost])
        axes.set_ylabel(metric)
        axes.margins(0.15)
    write_figure(figure, path)
