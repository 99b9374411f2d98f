"""The commands that show results: hf-sparse report | compare | sensitivity."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import RecipeError


def add_commands(commands: Any) -> None:
    """Add the commands to the parser of `hf-sparse`."""
    report = commands.add_parser("report", help="write what was removed, and what it changed, as one HTML page")
    report.add_argument("model", metavar="DIR", help="folder of a saved model")
    report.add_argument("--against", metavar="DENSE_DIR", help="the dense model to compare with")
    report.add_argument("--html", metavar="FILE", help="the page (DIR/report.html)")
    report.add_argument("--bench", metavar="FILE", help="JSON with timings, for the table of speed")
    _add_data(report, "texts of a classifier, for what pruning changed", required=False)
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="show which of many runs no other one beats")
    compare.add_argument("runs", nargs="+", metavar="DIR", help="folders that hf-sparse train wrote")
    compare.add_argument("--metric", default="accuracy", help="of eval_results.json; higher is better (accuracy)")
    compare.add_argument("--bench", metavar="FILE", help="JSON with timings: rows with model and ms")
    compare.add_argument("--plot", metavar="FILE", help="write the Pareto plots: png, pdf or svg")
    compare.add_argument("--html", metavar="FILE", help="write plots and table as one page")
    compare.set_defaults(command=_compare)

    sensitivity = commands.add_parser("sensitivity", help="measure how much the loss minds pruning each layer alone")
    sensitivity.add_argument("model", help="folder or Hub name, with a head for the task")
    _add_data(sensitivity, "texts to measure on", required=True)
    sensitivity.add_argument("--levels", default="0.5,0.7,0.9", metavar="S,S,...", help="sparsities (0.5,0.7,0.9)")
    sensitivity.add_argument(
        "--sparsity", type=float, default=0.8, metavar="S", help="total to suggest layers for (0.8)"
    )
    sensitivity.add_argument("--batch", type=int, default=16, metavar="N", help="texts at once (16)")
    sensitivity.add_argument("--plot", metavar="FILE", help="write loss over sparsity: png, pdf or svg")
    sensitivity.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sensitivity.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    sensitivity.set_defaults(command=_sensitivity)


def _add_data(parser: argparse.ArgumentParser, what: str, required: bool) -> None:
    parser.add_argument("--data", required=required, metavar="FILE", help=f"{what}: json, jsonl, csv, tsv or parquet")
    parser.add_argument(
        "--text", action="append", metavar="COLUMN", help="column with the text (text); twice for pairs"
    )
    parser.add_argument("--label", default="label", metavar="COLUMN", help="column with the label (label)")
    parser.add_argument("--samples", type=int, default=None if not required else 256, metavar="N", help="texts to use")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens kept of each text (128)")


def _section(options: argparse.Namespace) -> Any:
    from .recipe_sections import DataSection

    return DataSection(
        train=options.data,
        validation="none",  # nothing is trained, so nothing is held out
        text=options.text or "text",
        label=options.label,
        max_length=options.length,
        train_samples=options.samples,
    )


def _report(options: argparse.Namespace) -> None:
    from .report_page import write_report

    output = options.html or str(Path(options.model) / "report.html")
    data = _section(options) if options.data is not None else None
    write_report(options.model, output, options.against, options.bench, data)
    print(f"Saved in {output}")


def _compare(options: argparse.Namespace) -> None:
    from .compare import compare_page, head, plot, read_latency, read_run, rows

    latency = None if options.bench is None else read_latency(options.bench)
    runs = [read_run(folder, options.metric, latency) for folder in options.runs]
    lines = [head(options.metric), ["---"] * len(head(options.metric)), *rows(runs)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if options.plot is not None:
        plot(runs, options.metric, options.plot)
    if options.html is not None:
        _write(options.html, compare_page(runs, options.metric))


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write the page {path}: {error}") from error


def _sensitivity(options: argparse.Namespace) -> None:
    from .sensitivity import as_recipe, sensitivity

    try:
        levels = [float(level) for level in options.levels.split(",")]
    except ValueError as error:
        raise RecipeError(f"--levels is numbers with commas between, as in 0.5,0.9, not {options.levels!r}") from error
    found = sensitivity(options.model, _section(options), levels, options.batch, options.revision)
    if options.plot is not None:
        found.plot(options.plot)
    groups = found.allocations(options.sparsity)
    if options.json:
        print(json.dumps({**found.to_dict(), "groups": groups}, indent=2))
        return
    print(found)
    for way, suggested in groups.items():
        print(f"\n# {way}, {options.sparsity:g} in total\n{as_recipe(suggested)}", end="")
