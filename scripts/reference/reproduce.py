"""Train the reference results again: each a recipe, run with the models and data of this machine, into one file.

    python scripts/reference/reproduce.py --list                          # all of the plan, and what is missing
    python scripts/reference/reproduce.py --list sst2-magnitude-90        # as a command of the shell
    python scripts/reference/reproduce.py 'mrpc-*' --data DIR --model l3=DIR [--seeds 0,1] [--output DIR]

The plan is recipes/reference/plan.yaml. A result that the file has is left out (--again runs it anew), and a run
that is finished in its folder of --output is not trained again. What a run needs (its teacher, or its initial model) is
run before it. --bench times the models of finished runs, each interleaved with the dense run of its task.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_sparse import SparsityError
from hf_sparse.analysis.benchmark import bench
from hf_sparse.analysis.results import Method, Result, add_results, read_results
from hf_sparse.errors import CheckpointError, RecipeError
from hf_sparse.formats.inspection import Inspection, inspect
from hf_sparse.hf.hub.model_card import read_recipe
from hf_sparse.recipe.prune import compact_saved
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from hf_sparse.utils.strict_yaml import read_yaml
from scripts.reference.make_t5 import make
from scripts.reference.reference import RESULTS, Entry, Machine, read_plan

BENCH: dict[str, Any] = {"batch": 8, "length": 64, "rounds": 25}
METRICS_LEFT_OUT = ("runtime", "samples_per_second", "steps_per_second", "loss", "sparsity")


def reproduce(machine: Machine, entry: Entry, seed: int, results: Path, again: bool = False) -> Iterator[str]:
    """Run what is missing for a result, add it to the file, and say what was done."""
    if not again and (entry.name, seed) in machine.done(results):
        yield f"{entry.name} seed {seed}: there already"
        return
    if entry.needs:
        first = seed if entry.after else 0
        if not (machine.folder(entry.needs, first) / "eval_results.json").is_file():
            yield from reproduce(machine, machine.entries[entry.needs], first, results, again=True)
    if entry.model == "t5" and not entry.after and not (made := machine.model(entry, seed)).is_dir():
        make(made)
    folder = machine.folder(entry.name, seed)
    recipe = machine.load(entry, seed)
    if again or not _finished(folder, recipe):
        yield f"{entry.name} seed {seed}: training"
        run(recipe, overwrite=True)
    if entry.compact:
        compact_saved(str(folder), folder / "compact")
    result = result_of(machine, entry, seed, folder)
    add_results(results, [result])
    shown = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    yield f"{entry.name} seed {seed}: {shown}"


def _finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether a run of the same recipe ended in the folder, wherever its model and data were."""
    try:
        before = read_yaml(folder / "recipe.yaml")
        known = Recipe.from_dict(before).to_dict()  # by an older version, it may say less
    except ValueError:  # missing, incomplete, or of a version with other fields
        return False
    return (folder / "report.md").is_file() and _without_places(known) == _without_places(recipe.to_dict())


def _without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    places = {"model": ("name",), "data": ("train", "validation"), "training": ("output_dir",)}
    out = {
        section: {key: value for key, value in recipe[section].items() if key not in keys}
        for section, keys in places.items()
    }
    distillation = recipe["distillation"] and {**recipe["distillation"], "teacher": None}
    return {**recipe, **out, "distillation": distillation}


def result_of(machine: Machine, entry: Entry, seed: int, folder: Path) -> Result:
    """Return the result that a folder of a finished run holds.

    Raises:
        RecipeError: if a file is missing.
    """
    try:
        measured = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        steps = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        found = inspect(folder)
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise RecipeError(f"{folder} must hold a finished run: {error}") from error
    named = {key.removeprefix("eval_"): value for key, value in measured.items() if key.startswith("eval_")}
    small = inspect(folder / "compact") if entry.compact else None
    settings = read_recipe(folder / "recipe.yaml")
    settings["model"]["name"] = machine.plan["models"][entry.model]
    return Result(
        name=entry.name,
        task=entry.task,
        model=machine.plan["models"][entry.model],
        method=str(Method(entry.method, entry.teacher, entry.hidden, bool(entry.after))),
        sparsity=entry.sparsity,
        seed=seed,
        metrics={key: value for key, value in named.items() if key not in METRICS_LEFT_OUT},
        steps=steps,
        reached=_reached(found) if entry.sparsity else 0.0,
        bytes=sum(found.files.values()),
        compact_bytes=None if small is None else sum(small.files.values()),
        settings=_short(settings),
        note=f"starts from the model of {entry.after}" if entry.after else None,
        baseline=entry.baseline,
    )


def _reached(found: Inspection) -> float:
    """Return the part of the values of the targeted weights that is zero, or that a smaller form does without."""
    forms = [group for group in found.layers if group.parameters < group.entries]
    if forms:
        return 1 - sum(group.nonzeros for group in forms) / sum(group.entries for group in forms)
    return 1 - sum(w.nonzeros for w in found.weights) / sum(w.parameters for w in found.weights)


def measure(machine: Machine, entry: Entry, seed: int, results: Path) -> Iterator[str]:
    """Time the model of a finished run, compacted where it is, against the dense run of its task; add it to the result.

    Raises:
        RecipeError: if one of the two is not there.
    """
    known = {result.key: result for result in (*read_results(RESULTS), *read_results(results))}
    folder = machine.folder(entry.name, seed) / ("compact" if entry.compact else "")
    twin = f"{entry.task}-dense" + ("" if entry.own_model else f"-{entry.model}")
    twins = [machine.folder(twin, seed), machine.folder(twin, 0), machine.folder(entry.after or twin, 0)]
    dense = next((twin for twin in twins if (twin / "config.json").is_file()), None)
    if (entry.name, seed) not in known or dense is None or not (folder / "config.json").is_file():
        raise RecipeError(f"there is no finished run of {entry.name} with seed {seed} in {folder}, or no dense one")
    done = bench(str(folder), against=str(dense), threads=1, **BENCH)
    speed = {key: value for key, value in done.to_dict().items() if key != "report"}
    add_results(results, [dataclasses.replace(known[entry.name, seed], speed=speed)])
    yield f"{entry.name} seed {seed}: {done.verdict}"


def _short(value: Any) -> Any:
    """Leave out keys whose value is null, which is what they are at when left out."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items() if item is not None}
    return [_short(item) for item in value] if isinstance(value, list) else value


def listing(machine: Machine, results: Path) -> Iterator[str]:
    """Say which results there are, and which of them the file has."""
    done = machine.done(results)
    for entry in machine.entries.values():
        seeds = ", ".join(f"{seed} {'done' if (entry.name, seed) in done else 'missing'}" for seed in entry.seeds)
        yield f"{entry.name}: seed {seeds}" + (f"; needs {entry.needs}" if entry.needs else "")


def chosen(entries: Mapping[str, Entry], names: Sequence[str]) -> list[Entry]:
    """Return the entries that names or globs mean, in their order.

    Raises:
        RecipeError: for one that means none.
    """
    out: dict[str, Entry] = {}
    for name in names:
        matched = {key: entry for key, entry in entries.items() if fnmatchcase(key, name)}
        if not matched:
            raise RecipeError(f"there is no result '{name}' in the plan; --list shows them all")
        out |= matched
    return list(out.values())


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"seeds are whole numbers with commas between, as in 0,1, not {text!r}"
        ) from None


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def main() -> int:
    """Run what the command line names; return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="results of the plan; globs may be used")
    parser.add_argument("--list", action="store_true", help="run nothing: show the plan, or the command of each NAME")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="with a folder for each task")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="where l3, l6 or t5 is")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", help="other seeds than those of the plan")
    parser.add_argument("--output", type=Path, default=Path("runs/reference"), metavar="DIR", help="folders of runs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="file that results are added to")
    parser.add_argument("--again", action="store_true", help="also run what the file has")
    parser.add_argument("--bench", action="store_true", help="run nothing: time the models of runs that are done")
    parser.add_argument("--take", type=_file, metavar="FILE", help="run nothing: add the results of another file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE",
                        help="change all recipes, for a trial; needs --results of its own")  # fmt: skip
    options = parser.parse_args()
    plan, entries = read_plan()
    models = {}
    for text in options.model:
        name, equals, folder = text.partition("=")
        if not equals or name not in plan["models"]:
            parser.error(f"--model is one of {', '.join(plan['models'])} and its folder, as in l3=DIR, not {text!r}")
        models[name] = Path(folder).resolve()
    if options.overrides and options.results == RESULTS:
        parser.error("--set makes another run than the plan's, so it needs another --results FILE")
    models.setdefault("t5", options.output.resolve() / "models" / plan["models"]["t5"])
    machine = Machine(plan, entries, options.output.resolve(), options.data.resolve(), models, options.overrides)
    if options.take is not None:
        timed = [dataclasses.replace(result, speed=None) for result in read_results(options.results) if result.speed]
        # What differs in nothing but that it was not timed would take a speed away.
        add_results(options.results, [result for result in read_results(options.take) if result not in timed])
        return 0
    if not options.names:
        print("\n".join(listing(machine, options.results)))
        return 0
    try:
        named = chosen(machine.entries, options.names)
    except SparsityError as error:
        parser.error(str(error))
    failed = 0
    for entry in named:
        for seed in options.seeds or entry.seeds:
            if options.list:
                print(machine.command(entry, seed))
                continue
            try:
                steps = (
                    measure(machine, entry, seed, options.results)
                    if options.bench
                    else reproduce(machine, entry, seed, options.results, options.again)
                )
                for line in steps:
                    print(line, flush=True)
            except SparsityError as error:
                failed += 1
                print(f"{entry.name} seed {seed}: failed: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
