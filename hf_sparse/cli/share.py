"""The commands that show and share results: hf-sparse report | compare | sensitivity | bench | doctor | card | push."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..formats.safetensors_io import write_whole
from ..profiling.speed_record import SPEED
from ..runtime import BACKENDS
from .data_options import add_data, data_section


def add_commands(commands: Any) -> None:
    """Add the commands to the parser of `hf-sparse`."""
    report = commands.add_parser("report", help="write what was removed, and what it changed, as one HTML page")
    report.add_argument("model", metavar="DIR", help="folder of a saved model")
    report.add_argument("--against", metavar="DENSE_DIR", help="the dense model to compare with")
    report.add_argument("--html", metavar="FILE", help="the page (DIR/report.html)")
    report.add_argument("--bench", metavar="FILE", help="what `bench` wrote (DIR/speed.json, if it is there)")
    _add_data(report, "texts of a classifier, for what pruning changed", required=False)
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="show which of many runs no other one beats")
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders that hf-sparse train wrote, or a file of results"
    )
    compare.add_argument("--metric", default="accuracy", help="that is compared (accuracy)")
    for key in ("task", "model"):
        compare.add_argument(f"--{key}", help="whose results of a file are compared, where it has several")
    compare.add_argument(
        "--bench", action="append", default=[], metavar="FILE",
        help="what `bench` wrote; may be repeated (speed.json of each DIR)",
    )  # fmt: skip
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

    bench = commands.add_parser("bench", help="time a saved sparse model in runtime form, beside a dense one")
    bench.add_argument("model", metavar="DIR", help="folder or Hub name")
    bench.add_argument("--against", metavar="DENSE", help="dense model to compare with (the same weights, dense)")
    bench.add_argument("--threads", type=int, metavar="N", help="threads of torch (as many as it has)")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="texts at once (1)")
    bench.add_argument("--length", type=int, default=128, metavar="N", help="tokens of each text (128)")
    bench.add_argument("--rounds", type=int, default=15, metavar="N", help="passes of each model, in turns (15)")
    bench.add_argument("--backend", choices=BACKENDS, default="auto", help="see hf_sparse.to_runtime (auto)")
    bench.add_argument("--layers", action="store_true", help="print the table of layers too")
    bench.add_argument("--json", metavar="OUT", help="write everything to this file too")
    bench.add_argument(
        "--save", action="store_true", help="write it beside the model too (speed.json), for card, report and compare"
    )
    bench.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="say what this machine can run, and what is missing")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(command=_doctor)
    card = commands.add_parser("card", help="write the model card of a saved model into its folder (README.md)")
    card.add_argument("folder", metavar="DIR", help="folder of a saved model")
    card.add_argument("--against", metavar="DENSE_DIR", help="folder of the dense run, for its metrics")
    card.add_argument("--license", metavar="ID", help="license of the model, as in apache-2.0")
    card.add_argument("--force", action="store_true", help="also in place of a card that was written by hand")
    card.set_defaults(command=_card)

    push = commands.add_parser("push", help="upload a saved model to the Hub")
    push.add_argument("folder", metavar="DIR", help="folder of a saved model")
    push.add_argument("repo", metavar="REPO", help="as in user/name; made if there is none")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    push.add_argument("--revision", metavar="BRANCH", help="push to this branch (main); made if there is none")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.set_defaults(command=_push)


def _add_data(parser: argparse.ArgumentParser, what: str, required: bool) -> None:
    samples = 256 if required else None
    what = f"{what}: json, jsonl, csv, tsv or parquet"
    add_data(parser, what, required=required, label=" (label)", samples=samples, texts="texts to use")


def _report(options: argparse.Namespace) -> None:
    from ..analysis.model_report import write_report

    output = options.html or str(Path(options.model) / "report.html")
    data = data_section(options) if options.data is not None else None
    write_report(options.model, output, options.against, options.bench, data)
    print(f"Saved in {output}")


def _compare(options: argparse.Namespace) -> None:
    from ..analysis.pareto import compare_page, head, plot, rows
    from ..analysis.results import of_one_machine, read_results
    from ..analysis.runs import read_latency, read_run, runs_of
    from ..reporting.plotting import check_picture
    from ..utils.markdown import table

    if options.plot is not None:
        check_picture(options.plot)
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
        _write(options.html, compare_page(runs, options.metric))


def _write(path: str | Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error}") from error


def _sensitivity(options: argparse.Namespace) -> None:
    from ..analysis.allocation import check_total
    from ..analysis.sensitivity import as_recipe, sensitivity
    from ..reporting.plotting import check_picture

    try:
        levels = [float(level) for level in options.levels.split(",")]
    except ValueError as error:
        raise RecipeError(f"--levels is numbers with commas between, as in 0.5,0.9, not {options.levels!r}") from error
    check_total(options.sparsity, levels)  # now, not when all is measured
    if options.plot is not None:
        check_picture(options.plot)
    found = sensitivity(options.model, data_section(options), levels, options.batch, options.revision)
    if not options.json:
        print(found)
    groups = found.allocations(options.sparsity)
    if options.json:
        print(json.dumps({**found.to_dict(), "groups": groups}, indent=2))
    else:
        for way, suggested in groups.items():
            print(f"\n# {way}, {options.sparsity:g} in total\n{as_recipe(suggested)}", end="")
    if options.plot is not None:
        found.plot(options.plot)


def _bench(options: argparse.Namespace) -> None:
    from ..analysis.benchmark import bench

    if options.save and not Path(options.model).is_dir():
        raise RecipeError(f"--save writes beside the model, but '{options.model}' is no folder; use --json OUT")
    keys = ("against", "threads", "batch", "length", "backend", "rounds", "revision")
    done = bench(options.model, **{key: getattr(options, key) for key in keys})
    print(f"{done.report}\n\n{done}" if options.layers else done)
    for path in filter(None, (options.json, options.save and Path(options.model) / SPEED)):
        _write(path, json.dumps(done.to_dict(), indent=1) + "\n")


def _doctor(options: argparse.Namespace) -> None:
    from ..analysis.environment import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_dict(), indent=2) if options.json else diagnosis)


def _card(options: argparse.Namespace) -> None:
    from ..hf.hub.model_card import card_text, facts_of, write_card

    text = card_text(facts_of(options.folder, options.against, options.license))
    print(f"Wrote {write_card(options.folder, text, options.force)}")


def _push(options: argparse.Namespace) -> None:
    from ..hf.hub.push import push_folder

    keys = ("private", "revision", "create_pr")
    done = push_folder(options.folder, options.repo, **{key: getattr(options, key) for key in keys})
    print(f"Pushed: {done.pr_url or done.commit_url}")
