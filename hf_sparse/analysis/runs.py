"""Finished runs, read to be laid beside each other: from their folders, or from a file of results."""

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
from ..utils.validation import is_number
from .results import Result, by_name, of_one_machine


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: of its folder.
        method: scorers of its recipe, or "dense".
        asked: sparsity of its recipe.
        seed: of its recipe.
        value: of the metric, or its mean over seeds.
        setting: all of the recipe beside method, seed and paths, as text.
        megabytes: of its weight files; None where there are none.
        left: fraction of the weights that are not zero, of those asked to be sparse.
        milliseconds: from the timings, if there are some.
        time: of a pass, as a share of what the dense model takes.
        spread: lowest and highest value over seeds; None for a single run.
    """

    name: str
    method: str
    asked: float
    seed: int
    value: float
    setting: str
    megabytes: float | None = None
    left: float | None = None
    milliseconds: float | None = None
    time: float | None = None
    spread: tuple[float, float] | None = None


def runs_of(
    results: Sequence[Result], metric: str = "accuracy", task: str | None = None, model: str | None = None
) -> list[Run]:
    """Return one run for each name among results, with the means over seeds, and times of one machine.

    The method of runs that took another number of steps than most says so: what is pruned longer is another thing.

    Args:
        task, model: whose results are wanted; None = there is one only.

    Raises:
        RecipeError: if there are several tasks or models and none is named, or none has the metric.
    """
    known = of_one_machine(results)
    for key, wanted in (("task", task), ("model", model)):
        known = [result for result in known if wanted in (None, getattr(result, key))]
        if len(names := list(dict.fromkeys(getattr(result, key) for result in known))) > 1:
            raise RecipeError(f"there are results of several {key}s, so name one with --{key}: {', '.join(names)}")
    measured = [result for result in known if metric in result.metrics]
    if not measured:
        metrics = sorted({name for result in known for name in result.metrics})
        raise RecipeError(f"no result of these has metric '{metric}'; there are {', '.join(metrics) or 'none'}")
    named = by_name(measured).values()
    counts = Counter(found[0].steps for found in named if found[0].steps)
    usual = max(counts, key=lambda steps: (counts[steps], steps), default=None)
    return [_mean_run(found, metric, usual) for found in named]


def _mean_run(found: Sequence[Result], metric: str, usual: int | None) -> Run:
    first = found[0]
    steps = f", {first.steps:,} steps" if first.steps and first.steps != usual else ""
    values = [result.metrics[metric] for result in found]
    sizes = [size for result in found if (size := result.compact_bytes or result.bytes) is not None]
    reached = [result.reached for result in found if result.reached is not None]
    speeds = [Speed.from_dict(result.speed) for result in found if result.speed is not None]
    return Run(
        first.name,
        first.method + steps,
        first.sparsity,
        first.seed,
        statistics.mean(values),
        first.task,
        statistics.mean(sizes) / 1e6 if sizes else None,
        1 - (statistics.mean(reached) if reached else first.sparsity),
        time=statistics.mean(1 / speed.speedup[1] for speed in speeds) if speeds else None if first.sparsity else 1.0,
        spread=(min(values), max(values)) if len(values) > 1 else None,
    )


def method_of(recipe: Mapping[str, Any]) -> tuple[str, float]:
    """Return the name of the method and the sparsity that was asked.

    Example:
        >>> method_of({"sparsity": {"groups": [{"scorer": {"name": "movement"}, "sparsity": 0.9}]}})
        ('movement', 0.9)
    """
    section = recipe.get("sparsity")
    if not section:
        return "dense", 0.0
    groups = section.get("groups", [section])
    names = [g.get("scorer", "magnitude") for g in groups]
    scorers = {name if isinstance(name, str) else name["name"] for name in names}
    return "+".join(sorted(scorers)), float(groups[0].get("sparsity") or 0.0)


def setting_of(recipe: Mapping[str, Any]) -> str:
    """Return all that has to be the same in runs whose methods are compared, as text."""
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
        RecipeError: if `recipe.yaml` or `eval_results.json` is missing, cannot be read, or lacks something.
    """
    folder = Path(folder)
    try:
        recipe = read_yaml(folder / "recipe.yaml")
        measured = read_json(folder / "eval_results.json")
        (method, asked), setting, seed = method_of(recipe), setting_of(recipe), int(recipe["seed"])
        if measured is None:
            raise RecipeError("it has no eval_results.json")
    except (OSError, ValueError, OverflowError) as error:
        raise RecipeError(f"{folder} is no finished run of `hf-sparse train`: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RecipeError(f"{folder}/recipe.yaml is no recipe as `hf-sparse train` writes it: {error!r}") from error
    if f"eval_{metric}" not in measured:
        known = ", ".join(key.removeprefix("eval_") for key in measured)
        raise RecipeError(f"{folder}/eval_results.json has no metric '{metric}'; it has {known}")
    value = measured[f"eval_{metric}"]
    if not is_number(value):
        raise RecipeError(f"{folder}/eval_results.json says {value!r:.80} for '{metric}', which cannot be compared")
    name = folder.resolve().name
    try:
        found = inspect(folder)
    except CheckpointError:  # the results may be kept without the weights
        megabytes = left = None
    else:
        megabytes = sum(found.files.values()) / 1e6
        left = sum(w.nonzeros for w in found.weights) / max(1, sum(w.parameters for w in found.weights))
    return Run(
        name,
        method,
        asked,
        seed,
        float(value),
        setting,
        megabytes,
        left,
        milliseconds,
    )


def read_latency(
    folders: Sequence[str | os.PathLike[str]], files: Sequence[str | os.PathLike[str]] = ()
) -> list[float | None]:
    """Return the milliseconds of each folder: from the timings beside it, else from those files, by its name.

    A dense model's are also found in the timings of those that were compared with it.

    Raises:
        CheckpointError: if timings are none.
        RecipeError: if they were not measured alike, or could be those of two folders with one name.
    """
    own = {place: read_speed(path) for place, run in enumerate(folders) if (path := Path(run) / SPEED).is_file()}
    speeds = [*(read_speed(path) for path in files), *own.values()]
    settings = list(dict.fromkeys((s.machine, s.threads, s.dtype, s.batch, s.length) for s in speeds))
    if len(settings) > 1:
        raise RecipeError(
            f"these timings cannot be compared, as they were measured with {settings[0]} and {settings[1]}"
        )
    named = {speed.against: speed.dense for speed in speeds}
    named |= {speed.model: speed.sparse for speed in speeds if speed not in own.values()}  # those are of their folder
    names = [Path(run).resolve().name for run in folders]
    unclear = {name for place, name in enumerate(names) if place not in own and name in named and names.count(name) > 1}
    if unclear:
        raise RecipeError(
            f"several runs are called {', '.join(sorted(unclear))}, so their timings cannot be told apart: give each "
            "its own with `hf-sparse bench DIR --save`"
        )
    found = [own[place].sparse if place in own else named.get(name) for place, name in enumerate(names)]
    return [None if times is None else 1e3 * times[1] for times in found]


def by_seed(runs: Sequence[Run], metric: str) -> str:
    """Return a Markdown table, one row per method and sparsity, with the spread over seeds.

    Raises:
        RecipeError: if recipes differ in more than the sparsity section, the seed and paths, or two have one seed.
    """
    values: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.setting != runs[0].setting:
            raise RecipeError(f"these runs differ in more than method and seed: {runs[0].name} and {run.name}")
        if run.seed in values[run.asked, run.method]:
            raise RecipeError(f"{run.name}: there is another run of {run.method} at {run.asked} with seed {run.seed}")
        values[run.asked, run.method][run.seed] = run.value
    lines = [f"| sparsity | method | {metric} (mean) | per seed | lowest - highest |", "|---|---|---|---|---|"]
    for (sparsity, method), found in sorted(values.items()):
        seeds = [found[seed] for seed in sorted(found)]
        spread = f"{min(seeds):.3f} - {max(seeds):.3f}" if len(seeds) > 1 else "one seed"
        each = " ".join(f"{value:.3f}" for value in seeds)
        lines.append(f"| {sparsity:.0%} | {method} | {statistics.mean(seeds):.3f} | {each} | {spread} |")
    return "\n".join(lines)
