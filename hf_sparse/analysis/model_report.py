"""The report of a saved model as one HTML page: what was pruned, where, and how size, speed and predictions changed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import RecipeError
from ..formats.inspection import inspect
from ..formats.stored_layers import HEAD, removed_lines
from ..hf.auto import load_whole
from ..hf.trainer.evaluation import measured
from ..profiling.speed_record import SPEED, read_speed
from ..recipe.sections import DataSection
from ..reporting import html
from ..reporting.charts import line_chart
from ..reporting.plotting import require_matplotlib
from ..utils.atomic_io import read_json, write_text
from ..utils.validation import is_number
from ..vocabulary import read_report
from .kept_weights import weight_sections
from .robustness import BINS, Robustness, measure_robustness

SHOWN = 30
DENSE_SPARSE = ("dense", "sparse", "change")


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    bench: str | os.PathLike[str] | None = None,
    data: DataSection | None = None,
) -> None:
    """Write the report.

    Args:
        folder: a saved model; files that `hf-sparse train` wrote next to it are read too.
        output: the HTML file.
        against: the dense baseline.
        bench: JSON that `hf-sparse bench` wrote; None = the one next to the model, if it exists.
        data: examples (its `train`) to compare predictions on; needs `against`.

    Raises:
        BackendError: without matplotlib.
        RecipeError: if a model or a file cannot be read, or `data` comes without `against`.
        CheckpointError: if a packed model is corrupted, or the file of timings is not one.
    """
    require_matplotlib()
    if data is not None and against is None:
        raise RecipeError("--data compares predictions with those of the dense baseline: add --against DENSE_DIR")
    if not Path(output).absolute().parent.is_dir():  # now, not when all is measured
        raise RecipeError(f"cannot write {os.fspath(output)}: the folder {Path(output).parent} does not exist")
    folder = Path(folder)
    model = load_whole(str(folder))
    dense = None if against is None else load_whole(str(against))
    sections = [
        _sizes(folder, None if against is None else Path(against)),
        *_layers(folder),
        *_vocabulary(folder),
        _speed(folder, bench),
        *weight_sections(model, dense),
        _training(folder),
    ]
    if data is not None:
        sections += robustness_sections(measure_robustness(str(folder), model, str(against), dense, data))
    else:
        why = "it needs a classifier, its dense baseline (--against DENSE_DIR) and examples (--data FILE)"
        sections.append(html.Section("Predictions", omitted=why))
    text = html.render(f"Report of {folder.resolve().name}", sections)
    try:
        write_text(output, text)
    except OSError as error:
        raise RecipeError(f"cannot write {os.fspath(output)}: {error}") from error


def _sizes(folder: Path, against: Path | None) -> html.Section:
    rows, sizes = [], []
    for path in (folder, against):
        if path is None:
            continue
        files = inspect(path)
        size, total = sum(files.files.values()), sum(t.parameters for t in files.tensors)
        sizes.append(size)
        nonzeros = sum(t.nonzeros for t in files.tensors)
        rows.append([path.resolve().name, f"{total:,}", f"{nonzeros:,}", f"{size / 1e6:.2f} MB", *_metrics(path)])
    width = max(len(row) for row in rows)
    head = ["model", "parameters", "nonzeros", "files", *(["metrics"] if width > 4 else [])]
    note = f"The files are {sizes[0] / sizes[1]:.3f} times the size of the dense ones." if len(sizes) == 2 else ""
    return html.Section("Size", [html.Table(head, [row + ["-"] * (len(head) - len(row)) for row in rows])], note)


def _layers(folder: Path) -> list[html.Section]:
    """Return the section on other layers than matrices and on what has left, if there are any."""
    files = inspect(folder)
    others = any(group.kind != "matrices" for group in files.layers)
    rows = [list(group.row) for group in files.layers] if others else []
    lines = removed_lines(files.removed)
    if not rows and not lines:
        return []
    return [html.Section("Layers", [html.Table(HEAD, rows)] if rows else [], "; ".join(lines))]


def _metrics(folder: Path) -> list[str]:
    results = read_json(folder / "eval_results.json") or {}
    values = [f"{key} {value:.4f}" for key, value in measured(results).items() if is_number(value)]
    return [", ".join(values)] if values else []


def _speed(folder: Path, bench: str | os.PathLike[str] | None) -> html.Section:
    path = Path(bench) if bench is not None else folder / SPEED
    if bench is None and not path.is_file():
        why = "the model was not benchmarked: run `hf-sparse bench DIR --save`, or give --bench FILE"
        return html.Section("Speed", omitted=why)
    speed = read_speed(path)
    note = f"{speed.model}: median and quartiles of a forward pass, interleaved with the dense baseline."
    return html.Section("Speed", [html.Table(("", "measured"), speed.rows)], note)


def _vocabulary(folder: Path) -> list[html.Section]:
    """Return the section of a trimmed vocabulary, if the model has one."""
    report = read_report(folder)
    if report is None:
        return []
    parts: list[html.Table | html.Figures] = [html.Table(("", "before -> after"), report.lines)]
    points = [
        (-math.log10(1 - coverage), report.size_at(size) / 1e6) for coverage, size in report.curve if coverage < 1
    ]
    if len(points) > 1:
        name = "million parameters by coverage: 2 is 99 % of the tokens, 4 is 99.99 %"
        parts.append(html.Figures([html.Figure(name, charts=[line_chart(points, "nines of coverage", name)])]))
    if report.removed:
        rows = [[token, f"{count:,}"] for token, count in report.removed]
        parts.append(html.Table(("most frequent removed token", "occurrences in the corpus"), rows))
    return [html.Section("Vocabulary", parts, report.caveat or "")]


def _training(folder: Path) -> html.Section:
    state = read_json(folder / "trainer_state.json")
    title = "Training curves"
    if state is None or not isinstance(state.get("log_history"), list):
        return html.Section(title, omitted="there is no trainer_state.json next to the model")
    series: dict[str, dict[float, float]] = {}
    for row in state["log_history"]:
        if not isinstance(row, Mapping) or not is_number(row.get("step")):
            continue
        for key, value in row.items():
            wanted = key in ("sparsity", "loss") or bool(measured({key: value}))
            if wanted and is_number(value):
                series.setdefault(str(key), {})[row["step"]] = value
    figures = [
        html.Figure(name, charts=[line_chart(sorted(points.items()), "step", f"{name} by step")])
        for key, points in sorted(series.items(), key=lambda item: item[0] != "sparsity")
        if len(points) > 1
        for name in ["training loss" if key == "loss" else key.replace("eval_", "validation ", 1)]
    ]
    if not figures:
        return html.Section(title, omitted="trainer_state.json has no value at two or more steps")
    return html.Section(title, [html.Figures(figures)])


def robustness_sections(result: Robustness) -> list[html.Section]:
    """Return the sections on predictions: by class, changed ones, calibration, corrupted inputs."""
    rows: list[list[object]] = [
        [name, count, *("{} → {} ({})".format(*_change(*pair)) for pair in scores)]
        for name, count, *scores in result.classes()
    ]
    table = html.Table(["class", "examples", "precision", "recall", "F1"], rows)
    sections = [html.Section("Predictions by class", [table], "Dense → sparse (change)."), _changed(result)]
    rows = [[measure, *_change(*pair)] for measure, pair in result.calibration().items()]
    note = f"Expected calibration error: |confidence - accuracy| over {BINS} bins (Guo et al. 2017); 0 is best."
    sections.append(html.Section("Calibration", [html.Table(["measure", *DENSE_SPARSE], rows)], note))
    rows = [[corruption, *_change(*pair)] for corruption, pair in result.corrupted.items()]
    note = "Accuracy on corrupted inputs. Both models get the same ones (seeded swaps of adjacent letters)."
    sections.append(html.Section("Robustness", [html.Table(["inputs", *DENSE_SPARSE], rows)], note))
    return sections


def _changed(result: Robustness) -> html.Section:
    title, changed = "Changed predictions", result.changed()
    if not changed:
        return html.Section(title, omitted=f"both models predict the same class for all {len(result.labels)} examples")
    note = f"Of {len(result.labels)} predictions, "
    note += ", ".join(f"{count} {what}" for what, count in result.counts().items()) + "."
    note += f" The first {SHOWN} of {len(changed)} are shown." if len(changed) > SHOWN else ""
    rows = [[result.texts[index], *result.describe(index)] for index in changed[:SHOWN]]
    return html.Section(title, [html.Table(["example", "label", "dense", "sparse"], rows)], note)


def _change(before: float, after: float) -> tuple[str, str, str]:
    return f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
