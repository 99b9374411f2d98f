"""Several trainings in one go, each from the model that the one before has made.

```yaml
model: bert-base-uncased
data: {name: glue, config: sst2, text: sentence}
training: {learning_rate: 3.0e-5}                           # what all stages share
stages:
  - {name: dense, training: {num_train_epochs: 3}}
  - {name: pruned, sparsity: {sparsity: 0.75, pattern: head+neuron}, distillation: {teacher: self}}
  - name: filled                                            # cut out what was removed, then train the zeros again
    compact: true
    model: {fill: true}
    distillation: {teacher: dense}                          # the stage of that name
```

A stage is a partial recipe. Its `model`, `data` and `training` are merged into those that all share, key by key; any
other section takes the place of the shared one. `compact: true` cuts removed heads and neurons out of the model of the
stage before. A `teacher` that is the name of an earlier stage is its model. A stage writes into the folder of its name
in the output folder, the last one into the output folder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import CheckpointError, RecipeError
from ..registry import check_keys
from ..utils.strict_yaml import dump_yaml, parse_yaml, read_yaml
from .prune import compact_saved
from .recipe import Recipe, read_recipe
from .train import RunResult, run

_MERGED = ("model", "data", "training")
_OWN = ("name", "compact")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of several.

    Args:
        name: of the folder it writes.
        recipe: whole, with the folder of the stage before as its model and its own as its output.
        source: the model of the stage before that is to be compacted first; None = nothing is.
    """

    name: str
    recipe: Recipe
    source: str | None = None

    @property
    def output(self) -> Path:
        """Folder that it writes."""
        return Path(self.recipe.training["output_dir"])


def has_stages(path: str | os.PathLike[str]) -> bool:
    """Return whether a recipe file has stages."""
    return "stages" in read_recipe(path)


def load_stages(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> list[Stage]:
    """Read a recipe with stages, every one checked before the first begins.

    Raises:
        RecipeError: as `Recipe.load`, naming the stage.
    """
    data = read_recipe(path, overrides)
    parts = data.pop("stages")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
        raise RecipeError(f"stages is a list of partial recipes, not {parts!r}")
    stages: list[Stage] = []
    for index, part in enumerate(parts):
        name = part.get("name", f"stage{index + 1}")
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise RecipeError(f"stage {index + 1}: name is the name of a folder, not {name!r}")
        if name == "self":
            raise RecipeError(f"stage {index + 1}: 'self' as a teacher is the model before pruning; name it otherwise")
        if name in [stage.name for stage in stages]:
            raise RecipeError(f"stage {index + 1} has the name '{name}' of an earlier one, and would overwrite it")
        try:
            stages.append(_stage(data, part, name, stages, len(parts), Path(path)))
        except RecipeError as error:
            raise type(error)(f"stage '{name}': {error}") from error
    for index, stage in enumerate(stages):
        _check_among(stage, stages[index:], stages)
    return stages


def _check_among(stage: Stage, not_before: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Refuse what would be found out in the middle of the run, or never."""
    taught = stage.recipe.distillation
    if taught is not None and taught.teacher in [other.name for other in not_before]:
        raise RecipeError(
            f"stage '{stage.name}': the stage '{taught.teacher}' does not come before it, so it cannot be its teacher"
        )
    start = stage.recipe.model.name
    if stage.source is not None and start in [str(other.output) for other in stages]:
        raise RecipeError(
            f"stage '{stage.name}': the model that is compacted for it goes into {start}, and so does a stage of that "
            "name; give that stage another"
        )


def _stage(
    data: Mapping[str, Any], part: Mapping[str, Any], name: str, before: Sequence[Stage], count: int, path: Path
) -> Stage:
    check_keys(part, [*_OWN, *(field.name for field in dataclasses.fields(Recipe))], "the stage")
    cut = part.get("compact", False)
    if not isinstance(cut, bool):
        raise RecipeError(f"compact is true or false, not {cut!r}")
    if cut and not before:
        raise RecipeError("compact: the first stage has no stage before it whose model could be compacted")
    merged: dict[str, Any] = dict(data)
    for key in part:
        if key in _MERGED:
            merged[key] = {**_mapping(data, key), **_mapping(part, key)}
        elif key not in _OWN:
            merged[key] = part[key]
    training = _mapping(part, "training")
    if "output_dir" in training:
        raise RecipeError("training.output_dir is that of the whole recipe; a stage writes into the folder of its name")
    if before and {"name", "revision"} & set(_mapping(part, "model")):
        raise RecipeError("model.name is given, but a stage starts from the model of the stage before")
    whole = _mapping(data, "training").get("output_dir", os.path.join("runs", path.stem))
    if not isinstance(whole, str):
        raise RecipeError(f"training.output_dir is the name of a folder, not {whole!r}")
    output = whole if len(before) == count - 1 else os.path.join(whole, name)
    merged["training"] = {**_mapping(merged, "training"), "output_dir": output}
    recipe = Recipe.from_dict(merged).located(path.parent)
    source = None
    if before:
        start = str(before[-1].output)
        if cut:
            source, start = start, os.path.join(whole, f"{before[-1].name}_compact")
        model = dataclasses.replace(recipe.model, name=start, revision=None)
        recipe = dataclasses.replace(recipe, model=model)
    outputs = {stage.name: str(stage.output) for stage in before}
    teacher = _mapping(merged, "distillation").get("teacher")  # as written: a folder of that name is not meant
    if recipe.distillation is not None and teacher in outputs:
        taught = dataclasses.replace(recipe.distillation, teacher=outputs[teacher])
        recipe = dataclasses.replace(recipe, distillation=taught)
    return Stage(name, recipe, source)


def _mapping(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if key == "model" and isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise RecipeError(f"the {key} section is a mapping of keys to values, not {value!r}")
    return dict(value)


def run_stages(stages: Sequence[Stage], resume: bool = False) -> RunResult:
    """Run all stages and return what the last one measured.

    Args:
        resume: leave out the stages that are done, and go on in the one that was interrupted.

    Raises:
        RecipeError: as `run`.
        CheckpointError: on a resume, if a stage was run with another recipe.
    """
    stages[0].recipe.training_arguments()  # starts the processes' group, if there are several
    processes = PartialState()
    if not resume and processes.is_main_process:
        for stage in stages:  # what an earlier run has left there is not of this one
            for name in ("recipe.yaml", "report.md"):
                (stage.output / name).unlink(missing_ok=True)
    processes.wait_for_everyone()
    done = [_state(stage) for stage in stages]
    processes.wait_for_everyone()
    result: RunResult | None = None
    for stage, state in zip(stages, done, strict=True):
        if state == "done" and stage is not stages[-1]:
            continue
        if stage.source is not None and state == "new" and processes.is_main_process:
            compact_saved(stage.source, Path(stage.recipe.model.name))
        processes.wait_for_everyone()
        result = run(stage.recipe, resume=state != "new")
    assert result is not None
    return result


def _state(stage: Stage) -> str:
    """Return "new", "begun" or "done"."""
    written = stage.output / "recipe.yaml"
    if not written.is_file():
        return "new"
    if read_yaml(written) != parse_yaml(dump_yaml(stage.recipe.to_dict())):
        raise CheckpointError(
            f"stage '{stage.name}' in {stage.output} was run with another recipe than this one, so it cannot be gone "
            "on with. Give another --output, or start anew without --resume"
        )
    return "done" if (stage.output / "report.md").is_file() else "begun"
