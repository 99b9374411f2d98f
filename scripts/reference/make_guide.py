"""Write recipes/GUIDE.md and its pictures from the results and the template in recipes/reference.

    python scripts/reference/make_guide.py [--output recipes]

The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_sparse.analysis.pareto import plot
from hf_sparse.analysis.results import Result, by_name, common_machine, dense_baseline, of_one_machine
from hf_sparse.analysis.runs import runs_of
from hf_sparse.errors import RecipeError
from hf_sparse.profiling.speed_record import Speed, verdict
from hf_sparse.utils.markdown import table
from scripts.reference.claims import MAIN, verdicts
from scripts.reference.reference import ROOT, read_plan, reference_results

TEMPLATE = ROOT / "recipes" / "reference" / "guide.template.md"
TITLES = {
    "sst2": "SST-2: sentiment of a sentence",
    "mrpc": "MRPC: are two sentences paraphrases?",
    "rte": "RTE: does one text entail the other?",
    "stsb": "STS-B: how alike are two sentences?",
    "g2p": "CMUdict: words in phonemes, by a T5",
}
NOT_MEASURED = "not measured"
ROWS = {"experts.json": "scripts/reference/experts.py", "vgg16_oneshot.json": "scripts/reference/vgg16.py measure"}
"""Files of rows in recipes/reference, and what writes them."""
REMARKS = {
    "rte": "Evaluated on 277 examples: the standard error is 0.03, so no difference below is significant. "
    "Here, 'after dense' means after a dense run on MRPC.\n\n",
}


def guide(results: Sequence[Result]) -> str:
    """Return the guide.

    The template may contain `{{NAME}}` (mean of the main metric), `{{table NAME ...}}`, `{{rows FILE COLUMN ...}}`,
    `{{claims}}` and `{{tasks}}`.

    Raises:
        RecipeError: if the template names a result that is neither measured nor planned, or an unknown file of rows.
    """
    known, planned = by_name(results), {entry.name for entry in read_plan()[1]}

    def runs_called(name: str) -> Sequence[Result]:
        if name not in known and name not in planned:
            raise RecipeError(f"results of the guide must be measured or planned, got '{name}'")
        return known.get(name, [])

    def filled(match: re.Match[str]) -> str:
        what, *names = match[1].split()
        if what == "claims":
            return claims(results)
        if what == "tasks":
            return "\n\n".join(section(results, task) for task in TITLES)
        if what == "table":
            return result_table({name: runs_called(name) for name in names}, results)
        if what == "rows":
            return rows_table(*names)
        return mean(runs_called(what))

    return re.sub(r"{{(.+?)}}", filled, TEMPLATE.read_text(encoding="utf-8"))


def rows_table(name: str, *columns: str) -> str:
    """Return a table of columns of a file of rows; lists are values of one seed each.

    Raises:
        RecipeError: if it is not known what writes such a file.
    """
    if name not in ROWS:
        raise RecipeError(f"rows of the guide must be in {', '.join(ROWS)}, got '{name}'")
    path = ROOT / "recipes" / "reference" / name
    if not path.is_file():
        return f"{NOT_MEASURED.capitalize()}: `{ROWS[name]}`."
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return table(columns, [tuple(_cell(row[column]) for column in columns) for row in rows])


def _cell(found: Any) -> str:
    if isinstance(found, list):
        return spread(found)
    if isinstance(found, float):
        return f"{found:.3f}"
    return f"{found:,}" if isinstance(found, int) else str(found)


def mean(runs: Sequence[Result], metric: str | None = None) -> str:
    """Return the mean of a metric over seeds (None = the main metric of the task)."""
    values = _values(runs, metric)
    return f"{statistics.mean(values):.3f}" if values else NOT_MEASURED


def value(runs: Sequence[Result], metric: str | None = None) -> str:
    """Return the mean of a metric over seeds, with [lowest, highest] of two or more."""
    values = _values(runs, metric)
    return spread(values) if values else NOT_MEASURED


def spread(values: Sequence[float]) -> str:
    """Return the mean of values of one seed each, with [lowest, highest] of two or more."""
    return f"{statistics.mean(values):.3f}" + (f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else "")


def _values(runs: Sequence[Result], metric: str | None) -> list[float]:
    return [run.metrics[key] for run in runs if (key := metric or MAIN[run.task]) in run.metrics]


def _speed(runs: Sequence[Result], results: Sequence[Result]) -> str:
    speed = next((Speed.from_dict(run.speed) for run in runs if run.speed), None)
    if speed is None:
        return NOT_MEASURED
    return verdict(speed.speedup) + ("" if speed.machine == common_machine(results) else ", on another processor")


def claims(results: Sequence[Result]) -> str:
    """Return a section for each claim."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for found in verdicts(results):
        row = (found.where, f"**{found.outcome}**", str(found.seeds or "-"), found.figures)
        sections.setdefault(found.claim, []).append(row)
    head = ("results", "verdict", "seeds", "figures")
    return "\n\n".join(f"### {claim.capitalize()}\n\n{table(head, rows)}" for claim, rows in sections.items())


def section(results: Sequence[Result], task: str) -> str:
    """Return the section of a task: pictures and table."""
    here = [result for result in results if result.task == task]
    title = f"## {TITLES[task]}"
    if not here:
        return f"{title}\n\nNot measured yet."
    images = [
        f"![{MAIN[task]} versus file size and density, {runs[0].model}](reference/{name})\n\n"
        for name, runs in pictures(here).items()
    ]
    return f"{title}\n\n{REMARKS.get(task, '')}{''.join(images)}{result_table(by_name(here), results)}"


def result_table(groups: Mapping[str, Sequence[Result]], results: Sequence[Result]) -> str:
    """Return a table with a row for each name, in this order.

    Args:
        groups: runs of each name, one for each seed; none = not measured.
        results: all results, with the dense baselines.

    Raises:
        RecipeError: if the tasks have several main metrics.
    """
    measured = [runs[0] for runs in groups.values() if runs]
    main = {MAIN[result.task] for result in measured}
    if len(main) > 1:
        raise RecipeError(f"results of one table must have one main metric, got {', '.join(sorted(main))}")
    metrics = list(measured[0].metrics) if measured else []
    rows = []
    for name, runs in groups.items():
        if not runs:
            rows.append((name, "-", "0", *[NOT_MEASURED] * len(metrics), "-", "-", "-"))
            continue
        first = runs[0]
        dense = _dense(first, dense_baseline(results, first))
        sizes = [size for run in runs if (size := run.compact_bytes or run.bytes)]
        megabytes = f"{statistics.mean(sizes) / 1e6:.1f}" if sizes else "not recorded"
        speed = _speed(runs, results) if first.sparsity else "-"
        cells = [value(runs, metric) for metric in metrics]
        link = f"[{name}](../model_cards/{name}.md)"
        rows.append((link, f"{first.steps:,}", str(len(runs)), *cells, dense, megabytes, speed))
    head = ("result", "steps", "seeds", *metrics, f"dense: {''.join(main)}", "size, MB", "speed-up")
    return table(head, rows)


def _dense(result: Result, baseline: Sequence[Result]) -> str:
    if not result.sparsity:
        return "-"
    initial = result.how.after_dense and baseline and not baseline[0].how.after_dense
    return value(baseline) + (" (initial model)" if initial else "")


def pictures(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results in each picture of a task, by file name: one for each model with three results or more."""
    plan = read_plan()[0]
    out = {}
    for short, model in plan["models"].items():
        runs = [result for result in results if result.model == model]
        if len(by_name(runs)) > 2:
            default = short == plan["tasks"][runs[0].task]["model"]
            out[f"pareto-{runs[0].task}{'' if default else f'-{short}'}.png"] = runs
    return out


def write(folder: Path) -> None:
    """Write the guide and its pictures into a folder such as recipes/."""
    results = reference_results()
    comparable = of_one_machine(results)
    (folder / "reference").mkdir(parents=True, exist_ok=True)
    (folder / "GUIDE.md").write_text(guide(results), encoding="utf-8", newline="\n")
    for task, metric in MAIN.items():
        for name, runs in pictures([result for result in comparable if result.task == task]).items():
            plot(runs_of(runs, metric), metric, folder / "reference" / name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes", metavar="DIR")
    options = parser.parse_args()
    write(options.output)
    print(f"GUIDE.md and its pictures are in {options.output}")


if __name__ == "__main__":
    main()
