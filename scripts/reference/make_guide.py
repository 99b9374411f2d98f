"""Write recipes/GUIDE.md and its pictures from the results and the text in recipes/reference: no figure can rot.

    python scripts/reference/make_guide.py [--output recipes]

The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_sparse.analysis.pareto import plot
from hf_sparse.analysis.results import Result, by_name, common_machine, dense_twin, of_one_machine
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
REMARKS = {
    "rte": "Measured on 277 texts, where one standard error is 0.03: no difference of accuracy below is beyond chance. "
    "Here, 'after dense' is after a dense run on MRPC.\n\n",
}


def guide(results: Sequence[Result]) -> str:
    """Return the guide.

    Raises:
        RecipeError: if the text names a result that neither is there nor in the plan.
    """
    known, planned = by_name(results), {entry.name for entry in read_plan()[1]}

    def filled(match: re.Match[str]) -> str:
        name, _, what = match[1].partition(" ")
        if name == "claims":
            return claims(results)
        if name == "tasks":
            return "\n\n".join(section(results, task) for task in TITLES)
        if name not in known and name not in planned:
            raise RecipeError(f"the guide names a result '{name}', which is neither there nor planned")
        runs = known.get(name, [])
        return _speed(runs, results).replace("not measured", "speed not measured") if what == "speed" else value(runs)

    return re.sub(r"{{(.+?)}}", filled, TEMPLATE.read_text(encoding="utf-8"))


def value(runs: Sequence[Result], metric: str | None = None) -> str:
    """Return the mean of a metric over seeds (None = that of the task), with lowest and highest."""
    values = [run.metrics[metric or MAIN[run.task]] for run in runs if (metric or MAIN[run.task]) in run.metrics]
    if not values:
        return "not measured"
    spread = "one seed" if len(values) == 1 else f"{min(values):.3f} - {max(values):.3f}, {len(values)} seeds"
    return f"{statistics.mean(values):.3f} ({spread})"


def _speed(runs: Sequence[Result], results: Sequence[Result]) -> str:
    speed = next((Speed.from_dict(run.speed) for run in runs if run.speed), None)
    if speed is None:
        return "not measured"
    return verdict(speed.speedup) + ("" if speed.machine == common_machine(results) else ", on another processor")


def claims(results: Sequence[Result]) -> str:
    """Return the table of claims."""
    return table(
        ("claim", "where", "our results", "figures"),
        [(found.claim, found.where, f"**{found.said}**", found.figures) for found in verdicts(results)],
    )


def section(results: Sequence[Result], task: str) -> str:
    """Return the section of a task: picture and table."""
    here = [result for result in results if result.task == task]
    title = f"## {TITLES[task]}"
    if not here:
        return f"{title}\n\nNot measured yet."
    metrics = list(here[0].metrics)
    rows = []
    for name, runs in by_name(here).items():
        first = runs[0]
        dense = _dense(first, dense_twin(results, first))
        sizes = [size for run in runs if (size := run.compact_bytes or run.bytes)]
        megabytes = f"{statistics.mean(sizes) / 1e6:.1f}" if sizes else "not recorded"
        speed = _speed(runs, results) if first.sparsity else "-"
        shown = [value(runs, metric) for metric in metrics]
        rows.append((f"[{name}](../model_cards/{name}.md)", f"{first.steps:,}", *shown, dense, megabytes, speed))
    head = ("result", "steps", *metrics, f"dense: {MAIN[task]}", "files, MB", "speed")
    drawn = [
        f"![{MAIN[task]} against size and weights left, {runs[0].model}](reference/{name})\n\n"
        for name, runs in pictures(here).items()
    ]
    return f"{title}\n\n{REMARKS.get(task, '')}{''.join(drawn)}{table(head, rows)}"


def _dense(result: Result, twin: Sequence[Result]) -> str:
    if not result.sparsity:
        return "-"
    began = result.how.after_dense and twin and not twin[0].how.after_dense
    return value(twin) + (", where it began" if began else "")


def pictures(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return what is drawn of the results of a task, by name of file: those of each model that has three or more."""
    plan = read_plan()[0]
    out = {}
    for short, model in plan["models"].items():
        runs = [result for result in results if result.model == model]
        if len(by_name(runs)) > 2:
            own = short == plan["tasks"][runs[0].task]["model"]
            out[f"pareto-{runs[0].task}{'' if own else f'-{short}'}.png"] = runs
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
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes", metavar="DIR")
    options = parser.parse_args()
    write(options.output)
    print(f"GUIDE.md and its pictures are in {options.output}")


if __name__ == "__main__":
    main()
