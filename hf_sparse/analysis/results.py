"""Results of runs in one JSON file: settings, reached sparsity, size, metrics and speed.

The file is a list with one result a line. A result holds all its settings, so it does not depend on a recipe that may
change later.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from ..errors import RecipeError
from ..profiling.speed_record import Speed
from ..registry import check_keys
from ..utils.atomic_io import write_text
from ..utils.validation import is_number

_AFTER, _TEACHER, _HIDDEN = ", after dense", ", taught by ", " with hidden states"  # words: ok, they are in the files


class Method(NamedTuple):
    """How a run was pruned, field by field; the file of results holds it as text.

    Args:
        name: of the pruning method, or "dense".
        teacher: short name of the distillation teacher; None = no distillation.
        hidden: whether hidden states are distilled too.
        after_dense: whether it starts from the model of a dense run.
    """

    name: str
    teacher: str | None = None
    hidden: bool = False
    after_dense: bool = False

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return the fields of a text that `str` wrote. This is the only place that reads it.

        Example:
            >>> Method.parse("movement, taught by l6 with hidden states, after dense")  # words: ok
            Method(name='movement', teacher='l6', hidden=True, after_dense=True)
        """
        name, _, teacher = text.removesuffix(_AFTER).partition(_TEACHER)
        hidden = teacher.endswith(_HIDDEN)
        return cls(name, teacher.removesuffix(_HIDDEN) or None, hidden, text.endswith(_AFTER))

    @property
    def description(self) -> str:
        """The fields in words.

        Example:
            >>> Method("movement", teacher="l6", after_dense=True).description
            'movement, distilled from l6, after dense'
        """
        teacher = f", distilled from {self.teacher}{_HIDDEN if self.hidden else ''}" if self.teacher else ""
        return f"{self.name}{teacher}{_AFTER if self.after_dense else ''}"

    def __str__(self) -> str:
        teacher = f"{_TEACHER}{self.teacher}{_HIDDEN if self.hidden else ''}" if self.teacher else ""
        return f"{self.name}{teacher}{_AFTER if self.after_dense else ''}"


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Args:
        name: of the entry in the plan; name and seed identify a result.
        task: that it was trained for and evaluated on.
        model: initial model.
        method: of pruning, as text (see `Method`), or "dense".
        sparsity: the requested one.
        seed: of the run.
        metrics: on the validation examples.
        steps: optimizer steps; None = not recorded.
        reached: fraction of zeros in the targeted weights; None = not recorded.
        bytes: of its weight files; None = not recorded.
        compact_bytes: of the weight files after `compact`; None = not compacted.
        speed: measured by `hf-sparse bench` (`Comparison.to_dict`); None = not measured.
        settings: the recipe, without the folders of a machine; None = it was made without a recipe, see `note`.
        note: further remarks.
        baseline: name of the dense run that it is compared with; None = see `dense_baseline`.
    """

    name: str
    task: str
    model: str
    method: str
    sparsity: float
    seed: int
    metrics: Mapping[str, float]
    steps: int | None = None
    reached: float | None = None
    bytes: int | None = None
    compact_bytes: int | None = None
    speed: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    note: str | None = None
    baseline: str | None = None

    @classmethod
    def from_dict(cls, data: Any) -> Result:
        """Build from JSON types.

        Raises:
            RecipeError: for an unknown or missing field, or an invalid value.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a result must be a mapping of fields to values, got {data!r:.80}")
        fields = dataclasses.fields(cls)
        check_keys(data, [field.name for field in fields], "a result")
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in data]
        if missing:
            raise RecipeError(f"a result must have {', '.join(missing)}, got {data!r:.80}")
        for key in ("name", "task", "model", "method"):
            if not isinstance(data[key], str) or not data[key]:
                raise RecipeError(f"`{key}` of a result must be a string, got {data[key]!r:.80}")
        metrics = data["metrics"]
        if not isinstance(metrics, Mapping) or not metrics or not all(map(is_number, metrics.values())):
            raise RecipeError(f"{data['name']}: `metrics` must be a mapping of names to numbers, got {metrics!r:.80}")
        for key in ("sparsity", "seed", "steps", "reached", "bytes", "compact_bytes"):
            if not is_number(data.get(key, 0)) and (data[key] is not None or key in ("sparsity", "seed")):
                raise RecipeError(f"{data['name']}: `{key}` must be a number, got {data[key]!r:.80}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without fields that were not recorded."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def how(self) -> Method:
        """The method, field by field."""
        return Method.parse(self.method)

    @property
    def key(self) -> tuple[str, int]:
        """Name and seed, which identify it."""
        return self.name, self.seed


def dense_baseline(results: Sequence[Result], result: Result) -> list[Result]:
    """Return the dense runs that a result is compared with, one for each seed: of the same task and model.

    The first of these that there is: the runs that the result names (`Result.baseline`); those that began alike (from
    the initial model, or after a dense run) and took as many steps; those from the initial model with as many steps;
    those from the initial model with the most steps.
    """
    dense = [r for r in results if (r.task, r.model, r.sparsity) == (result.task, result.model, 0.0)]
    named = [r for r in dense if r.name == result.baseline]
    alike = [
        r for r in dense if (r.how, r.steps) == (Method("dense", after_dense=result.how.after_dense), result.steps)
    ]
    plain = [r for r in dense if r.how == Method("dense")]
    most = max((r.steps or 0 for r in plain), default=0)
    return (
        named or alike or [r for r in plain if r.steps == result.steps] or [r for r in plain if (r.steps or 0) == most]
    )


def by_name(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the results of each name, by seed."""
    out: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.key):
        out.setdefault(result.name, []).append(result)
    return out


def common_machine(results: Iterable[Result]) -> str | None:
    """Return the machine on which most speeds were measured."""
    counts = Counter(Speed.from_dict(result.speed).machine for result in results if result.speed)
    return max(counts, key=lambda machine: (counts[machine], machine), default=None)


def of_one_machine(results: Sequence[Result]) -> list[Result]:
    """Leave out speeds of other machines than the most common one, since they cannot be compared."""
    most = common_machine(results)
    return [
        result
        if not result.speed or Speed.from_dict(result.speed).machine == most
        else dataclasses.replace(result, speed=None)
        for result in results
    ]


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read a file of results; a file that does not exist has none.

    Raises:
        RecipeError: if it is not such a file, or has one result twice.
    """
    if not Path(path).exists():
        return []
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read results {os.fspath(path)}: {error}") from error
    if not isinstance(data, list):
        raise RecipeError(f"{os.fspath(path)} must be a list of results")
    results = [Result.from_dict(item) for item in data]
    seen = set()
    for result in results:
        if result.key in seen:
            raise RecipeError(f"{os.fspath(path)} has {result.name} with seed {result.seed} twice")
        seen.add(result.key)
    return results


def write_results(path: str | os.PathLike[str], results: Iterable[Result]) -> None:
    """Replace a file of results, in the order of names and seeds; an interruption leaves the old file intact.

    Raises:
        RecipeError: for a result that could not be read back, such as one whose metric is NaN.
    """
    known = [Result.from_dict(result.to_dict()) for result in results]
    lines = [json.dumps(result.to_dict()) for result in sorted(known, key=lambda result: result.key)]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def add_results(path: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Add results to a file, each in place of one with its name and seed; several processes may do so at once.

    Raises:
        RecipeError: as `read_results`.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{os.fspath(path)}.lock"):
        known = {result.key: result for result in (*read_results(path), *results)}
        write_results(path, known.values())
