"""Which of many runs no other one beats (Pareto): a table, a page and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..reporting import html as page
from ..reporting.plotting import new_figure, write_figure, write_labels
from .runs import Run

COSTS = {
    "megabytes": "size of the files in MB",
    "left": "fraction of weights left",
    "milliseconds": "latency in ms",
    "time": "time of a pass, as a share of dense's",
}
"""What a run costs, by the name of the field of `Run`; lower is better."""

LEFT_TICKS = {0.03: "3 %", 0.05: "5 %", 0.1: "10 %", 0.2: "20 %", 0.5: "50 %", 1.0: "100 %"}
"""Fractions of weights left that are marked on their axis."""

LOWER = ("wer", "loss")
"""Metrics that are better when they are lower."""


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


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of a table of single runs, numbered as in the plots of a page."""

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        [str(place), run.name, run.method, shown(run.value, 4), shown(run.megabytes, 2), shown(run.left, 4)]
        + [shown(run.milliseconds, 2), shown(run.time, 2)]
        for place, run in enumerate(runs, start=1)
    ]


def head(metric: str) -> list[str]:
    """Return the head of the table of `rows`."""
    return ["number", "run", "method", metric, "MB", "left", "ms", "time"]


def _points(runs: Sequence[Run], cost: str) -> tuple[list[int], list[tuple[float, float]]]:
    known = [place for place, run in enumerate(runs) if getattr(run, cost) is not None]
    return known, [(getattr(runs[place], cost), runs[place].value) for place in known]


def _front(points: Sequence[tuple[float, float]], metric: str) -> list[int]:
    return pareto([(cost, -value if metric in LOWER else value) for cost, value in points])


def _logarithmic(cost: str, points: Sequence[tuple[float, float]]) -> bool:
    costs = [point[0] for point in points]
    marked = sum(min(costs) <= tick <= max(costs) for tick in LEFT_TICKS)  # two at least make an axis
    return cost == "left" and min(costs) > 0 and marked > 1


def compare_page(runs: Sequence[Run], metric: str) -> str:
    """Return the HTML page: one plot for each cost that two runs or more have, and the table."""
    charts, missing = [], []
    for cost, label in COSTS.items():
        known, points = _points(runs, cost)
        if len(known) < 2:
            missing.append(label)
            continue
        ticks = LEFT_TICKS if _logarithmic(cost, points) else None
        picture = page.scatter(points, _front(points, metric), label, metric, [place + 1 for place in known], ticks)
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
    figure = new_figure(4.2 * len(drawn), 4.8)
    methods = list(dict.fromkeys(run.method for run in runs))
    for axes, cost in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        known, points = _points(runs, cost)
        front = sorted(points[place] for place in _front(points, metric))
        axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
        for place, point in zip(known, points, strict=True):
            _draw_run(axes, runs[place], point, methods.index(runs[place].method))
        axes.set_xlabel(COSTS[cost])
        axes.set_ylabel(f"{metric}, upwards is better")
        axes.margins(0.15)
        if _logarithmic(cost, points):
            axes.set_xscale("log")
            axes.set_xticks(list(LEFT_TICKS), list(LEFT_TICKS.values()), minor=False)
            axes.minorticks_off()
        if metric in LOWER:
            axes.invert_yaxis()
    handles = dict(zip(*_legend(figure), strict=True))
    wide = 0.6 + 0.07 * max(map(len, handles))  # inches that an entry of the legend takes
    columns = max(1, min(len(handles), int(4.2 * len(drawn) / wide)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    for axes, cost in zip(figure.axes, drawn, strict=True):
        if cost != "left":  # that axis says the sparsity itself
            _name_runs(figure, axes, runs, cost, methods)
    write_figure(figure, path)


def _draw_run(axes: Any, run: Run, point: tuple[float, float], method: int) -> None:
    if run.spread is not None:
        axes.vlines(point[0], *run.spread, color=f"C{method % 10}", alpha=0.5, linewidth=1.5)
    marker = "osD^vPX*<>"[(method + method // 10) % 10]  # ten colours and ten marks, and no pair twice in a hundred
    axes.scatter(*point, color=f"C{method % 10}", marker=marker, label=run.method, zorder=2)


def _name_runs(figure: Any, axes: Any, runs: Sequence[Run], cost: str, methods: Sequence[str]) -> None:
    known, points = _points(runs, cost)
    texts = [f"{100 * runs[place].asked:g} %" if runs[place].asked else "" for place in known]
    write_labels(figure, axes, points, texts, [f"C{methods.index(runs[place].method) % 10}" for place in known])


def _legend(figure: Any) -> tuple[list[str], list[Any]]:
    handles: list[Any] = []
    labels: list[str] = []
    for axes in figure.axes:
        found, names = axes.get_legend_handles_labels()
        handles, labels = handles + found, labels + names
    return labels, handles
