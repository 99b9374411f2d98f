"""Several trainings in one go, each from the model that the one before has made.

```yaml
model: bert-base-uncased
data: {name: glue, config: sst2, text: sentence}
training: {learning_rate: 3.0e-5}                           # what all stages share
stages:
  - {name: dense, training: {num_train_epochs: 3}}
  - {name: pruned, sparsity: {sparsity: 0.75, pattern: head+neuron}, distillation: {teacher: self}}
  - name: filled                                            # remove pruned heads and neurons, then train the zeros
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
from ..hf.trainer.checkpoint import check_unused, remove_trained, trained_files
from ..hf.trainer.run_record import STATE, changes, listing, read_record
from ..registry import check_keys
from ..utils.text import shorten
from ..utils.validation import check_bool, check_text
from .identity import OF_THE_MODEL, SECTION, recipe_facts
from .prune import compact_saved
from .recipe import Recipe, read_recipe
from .report import RunResult
from .train import check_flags, run

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
        raise RecipeError(f"`stages` must be a list of partial recipes, got {shorten(parts)}")
    root = _mapping(data, "training").get("output_dir", os.path.join("runs", Path(path).stem))
    check_text("training.output_dir", root)
    builder = _Builder(data, root, Path(path).parent, len(parts) - 1)
    stages = builder.stages
    for index, part in enumerate(parts):
        name = part.get("name", f"stage{index + 1}")
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise RecipeError(f"stage {index + 1}: `name` must be the name of a folder, got {shorten(name)}")
        if name == "self":
            raise RecipeError(
                f"stage {index + 1}: `name` must not be 'self', which as a teacher is the model before pruning"
            )
        if name in [stage.name for stage in stages]:
            raise RecipeError(
                f"stage {index + 1}: `name` must differ from those of earlier stages, got '{name}' again: it would "
                "overwrite that stage"
            )
        try:
            builder.add(part, name)
        except RecipeError as error:
            raise type(error)(f"stage '{name}': {error}") from error
    for index, stage in enumerate(stages):
        _check_among(stage, stages[index:], stages)
    return stages


def _check_among(stage: Stage, not_before: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Refuse what would be found out in the middle of the run, or never."""
    distillation = stage.recipe.distillation
    if distillation is not None and distillation.teacher in [other.name for other in not_before]:
        raise RecipeError(
            f"stage '{stage.name}': the stage '{distillation.teacher}' does not come before it, so it cannot be its "
            "teacher"
        )
    start = stage.recipe.model.name
    if stage.source is not None and start in [str(other.output) for other in stages]:
        raise RecipeError(
            f"stage '{stage.name}': the model that is compacted for it goes into {start}, and so does a stage of that "
            "name; give that stage another"
        )


@dataclasses.dataclass
class _Builder:
    """Makes the stages of a recipe, one after the other.

    Args:
        shared: what all stages share.
        root: output folder of the whole recipe.
        folder: of the recipe, for relative paths.
        last: number of the last stage.
    """

    shared: Mapping[str, Any]
    root: str
    folder: Path
    last: int
    stages: list[Stage] = dataclasses.field(default_factory=list)

    def add(self, part: Mapping[str, Any], name: str) -> None:
        """Check a partial recipe and add its stage."""
        self._check(part)
        merged = self._merged(part, name)
        recipe = self._with_teacher(Recipe.from_dict(merged).located(self.folder), merged)
        source = None
        if self.stages:
            start = str(self.stages[-1].output)
            if part.get("compact"):
                source, start = start, os.path.join(self.root, f"{self.stages[-1].name}_compact")
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name=start, revision=None))
        self.stages.append(Stage(name, recipe, source))

    def _check(self, part: Mapping[str, Any]) -> None:
        check_keys(part, [*_OWN, *(field.name for field in dataclasses.fields(Recipe))], "the stage")
        check_bool("compact", part.get("compact", False))
        if part.get("compact") and not self.stages:
            raise RecipeError("`compact` must be left out of the first stage, which has no model before it to compact")
        if "output_dir" in _mapping(part, "training"):
            raise RecipeError(
                "`training.output_dir` must be left out of a stage, which writes into the folder of its name: it is "
                "that of the whole recipe"
            )
        if self.stages and {"name", "revision"} & set(_mapping(part, "model")):
            raise RecipeError(
                "`model.name` and `model.revision` must be left out of a later stage, which starts from the model of "
                "the one before"
            )

    def _merged(self, part: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return the shared recipe with what a stage changes, and its output folder."""
        merged = dict(self.shared)
        for key in part:
            if key in _MERGED:
                merged[key] = {**_mapping(self.shared, key), **_mapping(part, key)}
            elif key not in _OWN:
                merged[key] = part[key]
        output = self.root if len(self.stages) == self.last else os.path.join(self.root, name)
        merged["training"] = {**_mapping(merged, "training"), "output_dir": output}
        return merged

    def _with_teacher(self, recipe: Recipe, merged: Mapping[str, Any]) -> Recipe:
        """Return the recipe with the folder of an earlier stage where its name is the teacher."""
        outputs = {stage.name: str(stage.output) for stage in self.stages}
        teacher = _mapping(merged, "distillation").get("teacher")  # as written: a folder of that name is not meant
        if recipe.distillation is None or teacher not in outputs:
            return recipe
        distillation = dataclasses.replace(recipe.distillation, teacher=outputs[teacher])
        return dataclasses.replace(recipe, distillation=distillation)


def _mapping(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if key == "model" and isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise RecipeError(f"the {key} section is a mapping of keys to values, not {value!r}")
    return dict(value)


def run_stages(
    stages: Sequence[Stage], resume: bool = False, overwrite: bool = False, allow: Sequence[str] = ()
) -> RunResult:
    """Run all stages and return what the last one measured.

    Args:
        resume: skip the stages that are finished, and continue the one that was interrupted.
        overwrite: replace the models and checkpoints of another run in the output folders.
        allow: as in `run`, for the stage that is continued.

    Raises:
        RecipeError: as `run`.
        CheckpointError: on a resume, if a stage was run with another recipe or other data.
    """
    check_flags(resume, overwrite, allow)
    stages[0].recipe.training_arguments()  # starts the processes' group, if there are several
    processes = PartialState()
    if processes.is_main_process and not resume:
        for stage in stages:
            if overwrite:
                remove_trained(stage.output)
            check_unused(stage.output)
            for name in ("recipe.yaml", "report.md"):  # of an earlier run that has left no model
                (stage.output / name).unlink(missing_ok=True)
    processes.wait_for_everyone()
    finished = [resume and is_finished(stage) for stage in stages]
    processes.wait_for_everyone()
    result: RunResult | None = None
    for stage, done in zip(stages, finished, strict=True):
        if done and stage is not stages[-1]:
            continue
        if stage.source is not None and not trained_files(stage.output) and processes.is_main_process:
            compact_saved(stage.source, Path(stage.recipe.model.name))
        processes.wait_for_everyone()
        begun = resume and bool(trained_files(stage.output))
        processes.wait_for_everyone()
        result = run(stage.recipe, resume=begun, allow=allow if begun else ())
    assert result is not None
    return result


def is_finished(stage: Stage) -> bool:
    """Return whether a stage has ended with the model of its recipe in its folder.

    Raises:
        CheckpointError: if it has ended with another recipe, or with other data.
    """
    if not (stage.output / "report.md").is_file() or not (stage.output / STATE).is_file():
        return False
    recorded = (read_record(stage.output, SECTION) or {}).get("facts")
    facts = recipe_facts(stage.recipe, stage.recipe.model.kind.load_examples(stage.recipe))
    if not isinstance(recorded, Mapping):
        raise CheckpointError(
            f"stage '{stage.name}' in {stage.output} was run by an older hf_sparse, which did not record what it ran. "
            "Give another --output, or replace it with --overwrite"
        )
    if found := changes({key: value for key, value in recorded.items() if key not in OF_THE_MODEL}, facts):
        raise CheckpointError(
            f"stage '{stage.name}' in {stage.output} was run with another recipe or other data: {listing(found)}. Give "
            "another --output, or run all stages anew with --overwrite"
        )
    return True
