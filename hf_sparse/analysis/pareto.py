"""The Pareto front of many runs: a table, a page and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..reporting import html
from ..reporting.charts import scatter, set_log_ticks
from ..reporting.plotting import new_figure, write_figure, write_labels
from .runs import Run

COSTS = {
    "megabytes": "file size (MB)",
    "density": "fraction of weights kept",
    "milliseconds": "latency (ms)",
    "relative_time": "latency relative to dense",
}
"""What a run costs, by the name of the field of `Run`; lower is better."""

DENSITY_TICKS = {0.03: "3 %", 0.05: "5 %", 0.1: "10 %", 0.2: "20 %", 0.5: "50 %", 1.0: "100 %"}
"""Fractions of weights kept that are marked on their axis."""

LOWER = ("wer", "loss")
"""Metrics that are better when they are lower."""


def pareto_front(points: Sequence[tuple[float, float]], metric: str = "accuracy") -> list[int]:
    """Return the indices of the points (cost, value) on the Pareto front, by rising cost.

    One point dominates another if it costs no more and is worth no less, and is better in one of the two.

    Args:
        metric: what the values are: those of `LOWER` are better when lower.

    Example:
        >>> pareto_front([(1, 0.8), (2, 0.7), (3, 0.9), (3, 0.9)])
        [0, 2, 3]
    """
    sign = -1 if metric in LOWER else 1
    points = [(cost, sign * value) for cost, value in points]
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of a table of runs, numbered as in the plots of a page."""

    def formatted(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        [
            str(number),
            run.name,
            run.method,
            formatted(run.value, 4),
            formatted(run.megabytes, 2),
            formatted(run.density, 4),
            formatted(run.milliseconds, 2),
            formatted(run.relative_time, 2),
        ]
        for number, run in enumerate(runs, start=1)
    ]


def head(metric: str) -> list[str]:
    """Return the head of the table of `rows`."""
    return ["number", "run", "method", metric, "MB", "density", "ms", "relative time"]


def points_of(runs: Sequence[Run], cost: str) -> tuple[list[int], list[tuple[float, float]]]:
    """Return the indices of the runs whose cost is known, and their points (cost, value)."""
    known = [index for index, run in enumerate(runs) if getattr(run, cost) is not None]
    return known, [(getattr(runs[index], cost), runs[index].value) for index in known]


def is_logarithmic(cost: str, points: Sequence[tuple[float, float]]) -> bool:
    """Return whether the axis of a cost is logarithmic: densities, where two ticks or more are in their range."""
    costs = [point[0] for point in points]
    marked = sum(min(costs) <= tick <= max(costs) for tick in DENSITY_TICKS)
    return cost == "density" and min(costs) > 0 and marked > 1


def compare_page(runs: Sequence[Run], metric: str) -> str:
    """Return the HTML page: one plot for each cost that two runs or more have, and the table.

    Raises:
        BackendError: without matplotlib.
    """
    figures, missing = [], []
    for cost, label in COSTS.items():
        known, points = points_of(runs, cost)
        if len(known) < 2:
            missing.append(label)
            continue
        caption, ticks = f"{metric} by {label}", DENSITY_TICKS if is_logarithmic(cost, points) else None
        names = [index + 1 for index in known]
        chart = scatter(points, pareto_front(points, metric), label, names, caption, ticks)
        figures.append(html.Figure(caption, charts=[chart]))
    note = "Numbers are those of the table. The line is the Pareto front."
    note += f" Omitted, as fewer than two runs have it: {', '.join(missing)}." if missing else ""
    plots = html.Section("Pareto plots", [html.Figures(figures)] if figures else [], note)
    if len({run.setting for run in runs}) > 1:
        note = "The recipes of these runs differ in more than method and seed."
    else:
        note = "The recipes of these runs differ in method and seed only."
    table = html.Section("Runs", [html.Table(head(metric), rows(runs))], note)
    return html.render("Comparison of runs", [plots, table])


def plot(runs: Sequence[Run], metric: str, path: str | os.PathLike[str]) -> None:
    """Draw the Pareto plots and write them to a file (png, pdf or svg by its suffix).

    Raises:
        BackendError: without matplotlib.
        RecipeError: for a suffix that matplotlib cannot write, or if there is nothing to draw.
    """
    write_figure(pareto_figure(runs, metric), path)


def pareto_figure(runs: Sequence[Run], metric: str) -> Any:
    """Return the Pareto plots as a matplotlib figure: one for each cost that two runs or more have.

    Raises:
        BackendError: without matplotlib.
        RecipeError: if there is no such cost.
    """
    drawn = [cost for cost in COSTS if len(points_of(runs, cost)[0]) > 1]
    if not drawn:
        raise RecipeError("a plot needs two runs with weight files, or with timings")
    figure = new_figure(4.2 * len(drawn), 4.8)
    methods = list(dict.fromkeys(run.method for run in runs))
    handles: dict[str, Any] = {}
    for axes, cost in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        known, points = points_of(runs, cost)
        front = [points[index] for index in pareto_front(points, metric)]
        axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1)
        for index, point in zip(known, points, strict=True):
            method = runs[index].method
            handles[_legend_label(method)] = _draw_run(axes, runs[index], point, methods.index(method))
        axes.set_xlabel(COSTS[cost])
        axes.set_ylabel(f"{metric} ({'lower' if metric in LOWER else 'higher'} is better)")
        axes.margins(0.15)
        if is_logarithmic(cost, points):
            set_log_ticks(axes, DENSITY_TICKS)
        if metric in LOWER:
            axes.invert_yaxis()
    width = 0.6 + 0.07 * max(map(len, handles))  # of an entry of the legend, in inches
    columns = max(1, min(len(handles), int(4.2 * len(drawn) / width)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    for axes, cost in zip(figure.axes, drawn, strict=True):
        if cost != "density":  # that axis shows the sparsity itself
            _label_sparsities(figure, axes, runs, cost, methods)
    return figure


def _legend_label(method: str) -> str:
    return f" {method}" if method.startswith("_") else method  # matplotlib hides labels that begin with "_"


def _draw_run(axes: Any, run: Run, point: tuple[float, float], method: int) -> Any:
    if run.spread is not None:
        axes.vlines(point[0], *run.spread, color=f"C{method % 10}", alpha=0.5, linewidth=1.5)
    marker = "osD^vPX*<>"[(method + method // 10) % 10]  # ten colors and ten markers, no pair twice in a hundred
    return axes.scatter(*point, color=f"C{method % 10}", marker=marker, label=run.method, zorder=2)


def _label_sparsities(figure: Any, axes: Any, runs: Sequence[Run], cost: str, methods: Sequence[str]) -> None:
    known, points = points_of(runs, cost)
    texts = [f"{100 * runs[index].sparsity:g} %" if runs[index].sparsity else "" for index in known]
    write_labels(figure, axes, points, texts, [f"C{methods.index(runs[index].method) % 10}" for index in known])
