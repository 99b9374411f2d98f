"""`hf-sparse compare`: a table of runs and their Pareto front."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import write_text
from ..verb import VERBS, Verb


@VERBS.register("compare")
class Compare(Verb):
    """Compare runs."""

    summary = "compare runs by metric, size and speed, and show their Pareto front"
    example = "runs/dense runs/sst2 --html compare.html"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="output folders of hf-sparse train, or files of results"
        )
        parser.add_argument("--metric", default="accuracy", help="metric to compare (accuracy)")
        for key in ("task", "model"):
            parser.add_argument(f"--{key}", help=f"which {key} of a file of results, where it has several")
        parser.add_argument(
            "--bench",
            action="append",
            default=[],
            metavar="FILE",
            help="output of `bench --json`; may be repeated (speed.json of each RUN)",
        )
        parser.add_argument("--plot", metavar="FILE", help="write the Pareto plots: png, pdf or svg")
        parser.add_argument("--html", metavar="FILE", help="write plots and table as one page")

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.pareto import compare_page, head, plot, rows
        from ...analysis.results import of_one_machine, read_results
        from ...analysis.runs import read_latency, read_run, runs_of
        from ...reporting.plotting import check_picture, require_matplotlib
        from ...utils.markdown import table

        if options.plot is not None:
            check_picture(options.plot)
        if options.html is not None:
            require_matplotlib()
        folders = [run for run in options.runs if not Path(run).is_file()]
        times = read_latency(folders, options.bench)
        runs = [read_run(folder, options.metric, ms) for folder, ms in zip(folders, times, strict=True)]
        if files := [run for run in options.runs if Path(run).is_file()]:
            results = [result for file in files for result in read_results(file)]
            runs += runs_of(results, options.metric, options.task, options.model)
            if left := [
                result.name for result, same in zip(results, of_one_machine(results), strict=True) if result != same
            ]:
                said = "times of these are left out, as they were measured on another machine than most"
                print(f"hf-sparse: {said}: {', '.join(dict.fromkeys(left))}", file=sys.stderr)
        print(table(head(options.metric), rows(runs)))
        if options.plot is not None:
            plot(runs, options.metric, options.plot)
        if options.html is not None:
            write_text(options.html, compare_page(runs, options.metric))
