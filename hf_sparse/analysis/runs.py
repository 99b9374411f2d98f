"""Finished runs, read for comparison: from their folders, or from a file of results."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RecipeError
from ..formats.inspection import inspect
from ..profiling.speed_record import SPEED, Speed, read_speed
from ..utils.atomic_io import read_json
from ..utils.strict_yaml import read_yaml
from ..utils.text import shorten
from ..utils.validation import check_integer, check_number, is_number
from .results import Result, by_name, of_one_machine


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: of its folder.
        method: scorers of its recipe, or "dense".
        sparsity: of its recipe.
        seed: of its recipe.
        value: of the metric, or its mean over seeds.
        setting: the recipe without method, seed and paths, as text; equal for runs that can be compared.
        megabytes: of its weight files; None = there are none.
        density: fraction of the targeted weights that are not zero.
        milliseconds: of a forward pass; None = not measured.
        relative_time: of a forward pass, divided by that of the dense baseline.
        spread: lowest and highest value over seeds; None for a single run.
    """

    name: str
    method: str
    sparsity: float
    seed: int
    value: float
    setting: str
    megabytes: float | None = None
    density: float | None = None
    milliseconds: float | None = None
    relative_time: float | None = None
    spread: tuple[float, float] | None = None


def runs_of(
    results: Sequence[Result], metric: str = "accuracy", task: str | None = None, model: str | None = None
) -> list[Run]:
    """Return one run for each name among results, with means over seeds, and times of one machine.

    The method of a run whose number of steps is not the most common one ends with that number.

    Args:
        task, model: whose results are used; None = there is only one.

    Raises:
        RecipeError: if there are several tasks or models and the argument is None, or no result has the metric.
    """
    known = of_one_machine(results)
    for key, wanted in (("task", task), ("model", model)):
        known = [result for result in known if wanted in (None, getattr(result, key))]
        if len(names := list(dict.fromkeys(getattr(result, key) for result in known))) > 1:
            raise RecipeError(f"the results have several {key}s; choose one with --{key}: {', '.join(names)}")
    measured = [result for result in known if metric in result.metrics]
    if not measured:
        metrics = sorted({name for result in known for name in result.metrics})
        raise RecipeError(f"no result has the metric '{metric}'; known metrics: {', '.join(metrics) or 'none'}")
    named = by_name(measured).values()
    counts = Counter(same[0].steps for same in named if same[0].steps)
    usual = max(counts, key=lambda steps: (counts[steps], steps), default=None)
    return [_mean_run(same, metric, usual) for same in named]


def _mean_run(results: Sequence[Result], metric: str, usual: int | None) -> Run:
    first = results[0]
    steps = f", {first.steps:,} steps" if first.steps and first.steps != usual else ""
    values = [result.metrics[metric] for result in results]
    sizes = [size for result in results if (size := result.compact_bytes or result.bytes) is not None]
    reached = [result.reached for result in results if result.reached is not None]
    speeds = [Speed.from_dict(result.speed) for result in results if result.speed is not None]
    return Run(
        first.name,
        first.method + steps,
        first.sparsity,
        first.seed,
        statistics.mean(values),
        f"{first.task}, {first.steps} steps",
        statistics.mean(sizes) / 1e6 if sizes else None,
        1 - (statistics.mean(reached) if reached else first.sparsity),
        relative_time=statistics.mean(1 / speed.speedup[1] for speed in speeds)
        if speeds
        else (None if first.sparsity else 1.0),
        spread=(min(values), max(values)) if len(values) > 1 else None,
    )


def method_of(recipe: Mapping[str, Any]) -> tuple[str, float]:
    """Return the name of the method of a recipe, and its sparsity.

    Example:
        >>> method_of({"sparsity": {"groups": [{"scorer": {"name": "movement"}, "sparsity": 0.9}]}})
        ('movement', 0.9)
    """
    section = recipe.get("sparsity")
    if not section:
        return "dense", 0.0
    groups = section.get("groups", [section])
    names = [group.get("scorer", "magnitude") for group in groups]
    scorers = {name if isinstance(name, str) else name["name"] for name in names}
    return "+".join(sorted(scorers)), float(groups[0].get("sparsity") or 0.0)


def setting_of(recipe: Mapping[str, Any]) -> str:
    """Return what must be equal in runs whose methods are compared, as text."""
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
        RecipeError: if `recipe.yaml` or `eval_results.json` is missing, cannot be read, or is not complete.
        CheckpointError: if `eval_results.json` is not a mapping.
    """
    folder = Path(folder)
    method, sparsity, setting, seed = _read_recipe(folder)
    measured = read_json(folder / "eval_results.json")
    if measured is None:
        raise RecipeError(f"{folder} is not a finished run of `hf-sparse train`: it has no eval_results.json")
    if f"eval_{metric}" not in measured:
        known = ", ".join(key.removeprefix("eval_") for key in measured)
        raise RecipeError(f"{folder}/eval_results.json has no metric '{metric}'; known metrics: {known}")
    value = measured[f"eval_{metric}"]
    if not is_number(value):
        raise RecipeError(f"'{metric}' in {folder}/eval_results.json must be a finite number, got {shorten(value)}")
    try:
        files = inspect(folder)
    except CheckpointError:  # the results may be kept without the weights
        megabytes = density = None
    else:
        megabytes = sum(files.files.values()) / 1e6
        density = sum(w.nonzeros for w in files.weights) / max(1, sum(w.parameters for w in files.weights))
    name = folder.resolve().name
    return Run(name, method, sparsity, seed, float(value), setting, megabytes, density, milliseconds)


def _read_recipe(folder: Path) -> tuple[str, float, str, int]:
    """Return method, sparsity, setting and seed of a run."""
    path = folder / "recipe.yaml"
    try:
        recipe = read_yaml(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder} is not a finished run of `hf-sparse train`: {error}") from error
    try:
        (method, sparsity), setting, seed = method_of(recipe), setting_of(recipe), recipe["seed"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise RecipeError(f"{path} is not a recipe that `hf-sparse train` wrote: {error!r:.80}") from error
    check_number(f"sparsity of {path}", sparsity)
    check_integer(f"seed of {path}", seed)
    return method, sparsity, setting, seed


def read_latency(
    folders: Sequence[str | os.PathLike[str]], files: Sequence[str | os.PathLike[str]] = ()
) -> list[float | None]:
    """Return the latency of each folder: from the timings stored in it, else from those files, by its name.

    That of a dense model is also found in the timings of models that were compared with it.

    Units: milliseconds.

    Raises:
        CheckpointError: if a file of timings cannot be read.
        RecipeError: if they were measured in different settings, or could be those of two folders with one name.
    """
    stored = {index: read_speed(path) for index, run in enumerate(folders) if (path := Path(run) / SPEED).is_file()}
    speeds = [*(read_speed(path) for path in files), *stored.values()]
    settings = list(dict.fromkeys((s.machine, s.threads, s.dtype, s.batch, s.length, s.examples) for s in speeds))
    if len(settings) > 1:
        raise RecipeError(
            f"timings must have one setting to be compared, got {settings[0]} and {settings[1]}; run `hf-sparse bench` "
            "with the same options"
        )
    named = {speed.against: speed.dense for speed in speeds}
    named |= {speed.model: speed.sparse for speed in speeds if speed not in stored.values()}
    names = [Path(run).resolve().name for run in folders]
    unclear = {
        name for index, name in enumerate(names) if index not in stored and name in named and names.count(name) > 1
    }
    if unclear:
        raise RecipeError(
            f"several runs are called {', '.join(sorted(unclear))}, so timings by name are ambiguous: store those of "
            "each with `hf-sparse bench DIR --save`"
        )
    times = [stored[index].sparse if index in stored else named.get(name) for index, name in enumerate(names)]
    return [None if seconds is None else 1e3 * seconds[1] for seconds in times]


def by_seed(runs: Sequence[Run], metric: str) -> str:
    """Return a Markdown table, one row per method and sparsity, with the spread over seeds.

    Raises:
        RecipeError: if recipes differ in more than the sparsity section, the seed and paths, or two have one seed.
    """
    values: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.setting != runs[0].setting:
            raise RecipeError(f"the recipes differ in more than method and seed: {runs[0].name} and {run.name}")
        seeds = values[run.sparsity, run.method]
        if run.seed in seeds:
            raise RecipeError(f"{run.name} is the second run of {run.method} at {run.sparsity} with seed {run.seed}")
        seeds[run.seed] = run.value
    lines = [
        f"| sparsity | method | {metric} (mean) | seeds | per seed | lowest - highest |",
        "|---|---|---|---|---|---|",
    ]
    for (sparsity, method), by_number in sorted(values.items()):
        each = [by_number[seed] for seed in sorted(by_number)]
        listed = " ".join(f"{value:.3f}" for value in each)
        lines.append(
            f"| {sparsity:.0%} | {method} | {statistics.mean(each):.3f} | {len(each)} | {listed} | "
            f"{min(each):.3f} - {max(each):.3f} |"
        )
    return "\n".join(lines)
