"""A recipe: one YAML file that says everything a training run needs. Strict, so that a typing error never trains.

```yaml
model: {name: bert-base-uncased}                            # a folder or a Hub name
data: {train: train.jsonl, validation: dev.jsonl, text: sentence, label: label, max_length: 64}
metric: accuracy
vocabulary: {coverage: 0.9999}                              # left out or null: the whole one
freeze: ["*embeddings*"]                                    # shell globs over parameter names
sparsity: {sparsity: 0.9, scorer: movement}                 # left out or null: dense fine-tuning
distillation: {teacher: self, temperature: 2.0}             # left out or null: no teacher
training: {max_steps: 1400, learning_rate: 1.0e-4}          # any field of transformers' TrainingArguments
seed: 0
```

Paths: a relative path means the file of that name under the working directory; where there is none, under the folder
of the recipe. A model name that is neither is a name on the Hub.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from transformers import TrainingArguments

from ..config.distillation import DistillationConfig
from ..config.resolve import plain, resolved
from ..config.sparsity import SparsityConfig
from ..errors import RecipeError
from ..hf.auto import check_found
from ..registry import check_keys
from ..utils.atomic_io import write_text
from ..utils.strict_yaml import dump_yaml, override, read_yaml
from ..utils.text import shorten
from ..utils.validation import check_bool, check_integer, check_number, check_text
from ..vocabulary import Criteria
from . import tasks as _tasks  # fills the registry  # noqa: F401
from .sections import DataSection, ModelSection


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything one training run needs.

    Args:
        model: `ModelSection`.
        data: `DataSection`.
        metric: names, see `hf_sparse.recipe.metrics`.
        vocabulary: `hf_sparse.vocabulary.Criteria`; tokens that the training examples do not need are removed first.
        freeze: shell globs over parameter names that are not trained.
        sparsity: `SparsityConfig`; None fine-tunes dense.
        distillation: `DistillationConfig`; None learns from the labels alone.
        training: fields of `transformers.TrainingArguments`.
        seed: of the task head, the data order and dropout.

    Example:
        >>> recipe = Recipe.from_dict({
        ...     "model": "bert-base-uncased",
        ...     "data": {"name": "glue", "config": "sst2", "text": "sentence"},
        ...     "sparsity": {"sparsity": 0.9, "scorer": "movement"},
        ...     "training": {"learning_rate": 1e-4},
        ... })
        >>> recipe.sparsity.groups[0].sparsity
        0.9
        >>> Recipe.from_dict({"model": "bert-base-uncased", "date": {}})
        Traceback (most recent call last):
            ...
        hf_sparse.errors.RecipeError: the recipe has no key 'date'; did you mean 'data'? Known keys: model, data, \
metric, vocabulary, freeze, sparsity, distillation, training, seed.
    """

    model: ModelSection
    data: DataSection
    metric: tuple[str, ...] = ("accuracy",)
    vocabulary: Criteria | None = None
    freeze: tuple[str, ...] = ()
    sparsity: SparsityConfig | None = None
    distillation: DistillationConfig | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain YAML types, every key and value checked, paths left as they are.

        Raises:
            RecipeError: for an unknown key (naming the nearest known one), a missing one, or a value of the wrong kind.
        """
        _check_mapping(data, "the recipe")
        if "stages" in data:
            raise RecipeError(
                "the recipe has stages, and only `hf-sparse train` runs those; give one without, for one run"
            )
        check_keys(data, [field.name for field in dataclasses.fields(cls)], "the recipe")
        for key in ("model", "data"):
            if data.get(key) is None:
                raise RecipeError(f"`{key}` is missing: the recipe needs a section of that name")
        model = {"name": data["model"]} if isinstance(data["model"], str) else data["model"]
        seed = data.get("seed", 0)
        check_integer("seed", seed, f"[0, {2**32})")
        section: ModelSection = _section(ModelSection, model, "the model section")
        if section.keep_zeros and data.get("sparsity") is not None:
            raise RecipeError(
                "model.keep_zeros trains the model with the zeros that it has, and the sparsity section prunes it: "
                "give one of the two"
            )
        examples: DataSection = _section(DataSection, data["data"], "the data section")
        task = section.kind
        task.check_data(examples)
        return cls(
            model=section,
            data=examples,
            metric=task.check_metrics(_words(data.get("metric", task.default_metric(section)), "metric")),
            vocabulary=_vocabulary(data.get("vocabulary")),
            freeze=_words(data.get("freeze") or (), "freeze"),
            sparsity=None if data.get("sparsity") is None else SparsityConfig.from_dict(data["sparsity"]),
            distillation=_distillation(data.get("distillation"), data.get("sparsity")),
            training=check_training(data.get("training") or {}, task.arguments()),
            seed=seed,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file, apply `key.path=value` overrides, and find its paths (see the head of this module).

        Raises:
            RecipeError: if the file cannot be read, is not a mapping, or as `from_dict`.
        """
        path = Path(path)
        recipe = cls.from_dict(read_recipe(path, overrides)).located(path.parent)
        training = {"output_dir": os.path.join("runs", path.stem), **recipe.training}
        return dataclasses.replace(recipe, training=training)

    def check_models(self, folder: Path) -> None:
        """Refuse a run whose model or teacher is in a folder that does not exist.

        Args:
            folder: of the recipe, where they were looked for too.

        Raises:
            RecipeError: naming both places.
        """
        check_found(self.model.name, "model", folder)
        if self.distillation is not None:
            check_found(self.distillation.teacher, "the teacher", folder)

    def located(self, folder: Path) -> Self:
        """Return the recipe with absolute paths, looked for in the working directory first, then in `folder`."""
        data = self.data
        if data.name is None:
            given = {key: getattr(data, key) for key in ("train", "validation", "reference")}
            paths: dict[str, Any] = {
                key: _locate_file(name, folder, key) for key, name in given.items() if name is not None
            }
            data = dataclasses.replace(data, **paths)
        name = _locate(self.model.name, folder) or self.model.name
        distillation = self.distillation
        if distillation is not None and distillation.teacher != "self":
            distillation = dataclasses.replace(
                distillation, teacher=_locate(distillation.teacher, folder) or distillation.teacher
            )
        if distillation is not None and distillation.cache is not None:
            distillation = dataclasses.replace(
                distillation, cache=_locate(distillation.cache, folder) or distillation.cache
            )
        model = dataclasses.replace(self.model, name=name)
        return dataclasses.replace(self, model=model, data=data, distillation=distillation)

    def to_dict(self) -> dict[str, Any]:
        """Return plain YAML types with every value written out, also those left at their default."""
        return {
            "model": dataclasses.asdict(self.model),
            "data": {**dataclasses.asdict(self.data), **_columns(self.data)},
            "metric": _one_or_list(self.metric),
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_dict(),
            "freeze": list(self.freeze),
            "sparsity": None if self.sparsity is None else resolved(self.sparsity),
            "distillation": None if self.distillation is None else _spelled_distillation(self.distillation),
            "training": dict(self.training),
            "seed": self.seed,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML; `Recipe.load` of that file is the same run."""
        write_text(path, dump_yaml(self.to_dict()))

    def training_arguments(self) -> TrainingArguments:
        """Return the `TrainingArguments` of the recipe.

        The seed is the recipe's, and so is the data order's: two methods under one seed see the same batches.

        Raises:
            RecipeError: if `TrainingArguments` refuses a value.
        """
        defaults = {
            "output_dir": os.path.join("runs", "recipe"),
            "data_seed": self.seed,
            # True, as transformers has it, makes every data loader warn where there is no accelerator.
            "dataloader_pin_memory": torch.accelerator.is_available(),
        }
        task = self.model.kind
        try:
            return task.arguments()(seed=self.seed, **{**defaults, **task.default_arguments(), **self.training})
        except (TypeError, ValueError, ImportError) as error:
            raise RecipeError(f"`training` must be arguments that transformers accepts: {error}") from error


def read_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a recipe file says, with overrides applied and nothing checked.

    Raises:
        RecipeError: if the file cannot be read, or is not a mapping.
    """
    data = read_yaml(path)
    _check_mapping(data, f"recipe {path}")
    for assignment in overrides:
        data = override(data, assignment)
    return dict(data)


AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
"""Arguments of a Trainer that it fails on late, or without their name, where they are 0."""


def check_training(training: Any, arguments: type[TrainingArguments] = TrainingArguments) -> dict[str, Any]:
    """Return the training section, its keys and the kinds of its values checked against the arguments of a Trainer.

    Raises:
        RecipeError: for an unknown field (naming the nearest one) or a value of the wrong kind.
    """
    _check_mapping(training, "the training section")
    check_keys(training, [field.name for field in dataclasses.fields(arguments)], "the training section")
    if "seed" in training:
        raise RecipeError("`training.seed` must be left out: the seed stands at the top of the recipe, as in `seed: 0`")
    if "hub_token" in training:
        raise RecipeError(
            "`training.hub_token` must be left out: a recipe is saved and shared. Log in with `hf auth login`"
        )
    if "output_dir" in training:
        check_text("training.output_dir", training["output_dir"])
    hints = typing.get_type_hints(arguments)
    for key, value in training.items():
        _check_kind(value, hints[key], f"training.{key}")
        if key in AT_LEAST_ONE and value < 1:
            raise RecipeError(f"`training.{key}` must be at least 1, got {value}")
    return dict(training)


def _check_kind(value: Any, hint: Any, where: str) -> None:
    """Refuse what `TrainingArguments` would take at face value: "no" is true, and "1e-4 " is a string."""
    allowed = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if value is None and type(None) in allowed:
        return
    allowed.discard(type(None))
    if allowed == {bool}:
        check_bool(where, value)
    elif allowed == {int}:
        check_integer(where, value)
    elif allowed == {float} and not isinstance(value, float):  # `max_grad_norm` may be infinite
        check_number(where, value)


def _vocabulary(section: Any) -> Criteria | None:
    return None if section is None else cast(Criteria, _section(Criteria, section, "the vocabulary section"))


def _distillation(section: Any, sparsity: Any) -> DistillationConfig | None:
    if section is None:
        return None
    config = DistillationConfig.from_dict(section)
    if sparsity is None and config.teacher == "self":
        raise RecipeError(
            "the recipe has a 'distillation' section with teacher 'self', but no 'sparsity': there is no student to be "
            "pruned. Name another model as teacher"
        )
    return config


def _spelled_distillation(config: DistillationConfig) -> dict[str, Any]:
    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _section(cls: type[Any], data: Any, where: str) -> Any:
    _check_mapping(data, where)
    check_keys(data, [field.name for field in dataclasses.fields(cls)], where)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in data:
            raise RecipeError(f"`{field.name}` is missing in {where}")
    return cls(**data)


def _locate(name: str, folder: Path) -> str | None:
    """Return the absolute path of what exists under that name, the working directory before `folder`."""
    for candidate in (Path(name).expanduser(), folder / name):
        if candidate.exists():
            return str(candidate.resolve())
    return None


def _locate_file(name: str, folder: Path, key: str) -> str:
    path = _locate(name, folder)
    if path is None or not os.path.isfile(path):
        raise RecipeError(
            f"`data.{key}` must be a file, and there is no {name} in the working directory {os.getcwd()} or in the "
            f"folder of the recipe, {folder.resolve()}"
        )
    return path


def _words(value: Any, where: str) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not all(isinstance(word, str) and word for word in words):
        raise RecipeError(f"`{where}` must be a string or a list of strings, got {shorten(value)}")
    return tuple(words)


def _columns(section: DataSection) -> dict[str, Any]:
    """Return the names of the columns in plain YAML types."""
    named = section.validation_text
    return {
        "text": _one_or_list(section.text_columns),
        "validation_text": None if named is None else _one_or_list(section.validation_columns),
    }


def _one_or_list(words: Sequence[str]) -> str | list[str]:
    return words[0] if len(words) == 1 else list(words)


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping of keys to values, got {shorten(value)}")
