"""The model card: facts and measurements of a saved model, from its files alone.

The card claims nothing that is not in a file: a figure that was not measured is marked as such. Text from files (names
of models and data, the recipe) is escaped, so that it cannot become Markdown, HTML or metadata. The words are in
`model_card_template.md`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...errors import CheckpointError, RecipeError
from ...formats.inspection import Inspection, inspect
from ...formats.model_folder import check_link
from ...formats.stored_layers import HEAD, LayerGroup
from ...profiling.speed_record import SPEED, Speed, read_speed
from ...utils.atomic_io import read_json, write_text
from ...utils.markdown import fenced, plain, table
from ...utils.strict_yaml import dump_yaml, read_yaml
from ...utils.text import kind_of_name
from ...utils.validation import is_number
from ...vocabulary.report import REPORT, VocabularyReport, read_report
from ..trainer.evaluation import measured

TASKS = {"ForSequenceClassification": "text-classification", "ForConditionalGeneration": "text2text-generation"}
OWNED_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
RECIPE = "recipe.yaml"
MEASURED = "eval_results.json"
BEFORE_COMPACTION = "before_compaction"
"""Key of that file: its metrics were measured before compaction."""


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """The content of a card. What is None or empty was not recorded, and is marked as such."""

    title: str
    architecture: str | None = None
    base_model: str | None = None
    data: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dense_metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    groups: Sequence[tuple[str, int, float]] = ()
    layers: Sequence[LayerGroup] = ()
    sizes: Sequence[tuple[str, str]] = ()
    vocabulary: VocabularyReport | None = None
    speed: Speed | None = None
    recipe: str | None = None
    license: str | None = None
    note: str | None = None
    loads: bool = True
    pruned: bool = True


def facts_of(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    license: str | None = None,  # noqa: A002
) -> CardFacts:
    """Collect the facts from the files of a saved model.

    Args:
        against: folder of the dense run of the same recipe, for its metrics.
        license: identifier of the license on the Hub, if known.

    Raises:
        CheckpointError: if a file is missing or corrupted, or a link that leads out of the folder.
    """
    folder = Path(folder)
    inspection = inspect(folder)
    for name in ("config.json", RECIPE, MEASURED, SPEED, REPORT):
        check_link(folder / name)
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"folder {folder} has no config.json: it has to hold a saved model")
    recipe = read_recipe(folder / RECIPE)
    data = recipe.get("data") or {}
    named = " / ".join(str(data[key]) for key in ("name", "config") if data.get(key))
    speed = folder / SPEED
    dense_metrics = {} if against is None else _metrics(Path(against))
    if against is not None and not dense_metrics:
        raise CheckpointError(
            f"{os.fspath(against)} has no {MEASURED} with metrics: it has to be the folder of a dense run"
        )
    architectures = config.get("architectures")
    return CardFacts(
        title=folder.resolve().name,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        base_model=(recipe.get("model") or {}).get("name"),
        data=named or data.get("train"),
        dataset=data.get("name"),
        metrics=_metrics(folder),
        dense_metrics=dense_metrics,
        groups=_groups(inspection),
        layers=inspection.layers,
        sizes=(
            ("targeted weights", inspection.size_line()),
            ("all files", f"{sum(inspection.files.values()) / 1e6:.2f} MB"),
        ),
        vocabulary=read_report(folder),
        speed=read_speed(speed) if speed.is_file() else None,
        recipe=dump_yaml(recipe) if recipe else None,
        license=license,
        note=_compaction(folder, inspection),
        pruned=inspection.packed or bool(recipe.get("sparsity")),
    )


def _compaction(folder: Path, inspection: Inspection) -> str | None:
    """Describe which heads, neurons, experts and filters are left after compaction."""
    if not inspection.removed:
        return None
    left = " and ".join(f"{left:,} of {before:,} {kind}" for kind, (left, before, _) in inspection.removed.items())
    text = f"Compaction kept {left} of the pruned parts; the removed ones are not counted below."
    if (read_json(folder / MEASURED) or {}).get(BEFORE_COMPACTION):
        text += " Metrics were measured before compaction, which changes outputs by rounding errors only."
    return text


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe redacted for publication: of absolute paths, which reveal a machine, only the last part.

    Raises:
        CheckpointError: if it is not a YAML mapping. (A missing file is an empty recipe.)
    """
    if not path.exists():
        return {}
    try:
        recipe = read_yaml(path)
    except RecipeError as error:
        raise CheckpointError(f"the recipe is corrupted: {error}") from None
    if not isinstance(recipe, dict) or not all(
        isinstance(recipe.get(key) or {}, dict) for key in ("model", "data", "training")
    ):
        raise CheckpointError(f"{path} must be a mapping with the sections model, data and training")
    (recipe.get("training") or {}).pop("output_dir", None)
    return _redacted(recipe)


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    for path in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and path(value).is_absolute():
            return path(value).name
    return value


def forget(folder: Path) -> None:
    """Remove the measurements of the model in a folder before another replaces it."""
    for name in (SPEED, MEASURED, "all_results.json", "train_results.json", "report.md"):
        (folder / name).unlink(missing_ok=True)


def _metrics(folder: Path) -> dict[str, float]:
    found = measured(read_json(folder / MEASURED) or {}, without=["loss"])
    return {key: float(value) for key, value in found.items() if is_number(value)}


def _groups(inspection: Inspection) -> list[tuple[str, int, float]]:
    """Return parameters and sparsity of each kind of weight, over all layers."""
    totals: dict[str, list[int]] = {}
    for weight in inspection.weights:
        kind = totals.setdefault(kind_of_name(weight.name), [0, 0])
        kind[0] += weight.parameters
        kind[1] += weight.nonzeros
    return [(name, size, 1.0 - kept / size if size else 0.0) for name, (size, kept) in totals.items()]


def card_text(facts: CardFacts, tags: Sequence[str] = ()) -> str:
    """Return the card, metadata first.

    Args:
        tags: more of them for the metadata.
    """
    card = ModelCard.from_template(_metadata(facts, tags), template_path=str(TEMPLATE), **_values(facts))
    text = f"{card.content}\n"
    return f"{text}\n{_seal(text)}\n"


def _seal(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<!-- Written by hf_sparse, and written anew as long as nobody edits it: {digest} -->"


def is_ours(text: str) -> bool:
    """Return whether hf_sparse wrote a card and nobody edited it, so that it may be replaced."""
    body, _, seal = text.removesuffix("\n").rpartition("\n")
    return seal == _seal(body)


def write_card(folder: str | os.PathLike[str], text: str, force: bool = False) -> Path:
    """Write the card of a folder.

    Args:
        force: also replace a card that was written or edited by hand.

    Raises:
        RecipeError: if there is such a card.
    """
    path = Path(folder) / CARD
    if path.is_file() and not force and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        raise RecipeError(f"{path} was written or edited by hand and would be lost: move it away, or add --force")
    write_text(path, text)
    return path


def _metadata(facts: CardFacts, tags: Sequence[str]) -> ModelCardData:
    task = next((TASKS[end] for end in _ends(facts)), None)
    dataset = facts.dataset if facts.dataset and HUB_NAME.fullmatch(str(facts.dataset)) else None
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=dataset or "custom",
            dataset_name=" ".join(str(facts.data or "not recorded").split()),
            metric_type=name,
            metric_value=value,
        )
        for name, value in facts.metrics.items()
    ]
    # A bare name may be that of a folder, and a link to the wrong model is worse than a missing link.
    base = str(facts.base_model) if re.fullmatch(OWNED_NAME, str(facts.base_model)) else None
    return ModelCardData(
        base_model=base,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        library_name="transformers",
        license=facts.license,
        model_name=" ".join(facts.title.split()) if results else None,
        pipeline_tag=task,
        tags=["hf_sparse", *(("sparse", "pruning") if facts.pruned else ()), *tags],
    )


def _values(facts: CardFacts) -> dict[str, Any]:
    """Return the variables of the template: Markdown, escaped where it is text from files."""
    loads = (f"AutoModel{end.replace('ForConditionalGeneration', 'ForSeq2SeqLM')}" for end in _ends(facts))
    return {
        "title": plain(facts.title),
        "pruned": facts.pruned,
        "base_model": plain(facts.base_model or "not recorded"),
        "architecture": plain(facts.architecture or "not recorded"),
        "data": plain(facts.data or "not recorded"),
        "license": plain(facts.license or "not recorded: the license of the base model and the data applies"),
        "note": plain(facts.note) if facts.note else None,
        "metrics": _metric_table(facts),
        "sparsity": _sparsity(facts),
        "layers": _layers(facts),
        "size": table(("", "stored"), [(plain(k), plain(v)) for k, v in facts.sizes]) or "Not measured.",
        "vocabulary": facts.vocabulary.to_markdown() if facts.vocabulary else None,
        "speed": _speed(facts.speed),
        "auto_class": next(loads, "AutoModel") if facts.loads else None,
        "recipe": fenced(facts.recipe, "yaml") if facts.recipe else "Not recorded.",
    }


def section_tables(facts: CardFacts) -> list[tuple[str, str]]:
    """Return title and Markdown of the tables of a card that are about sparsity."""
    values = _values(facts)
    shown = {"Metrics": "metrics", "Zeros": "sparsity", "Layers": "layers", "Size": "size", "Speed": "speed"}
    note = [("Compaction", values["note"])] if values["note"] else []
    recipe = [("Recipe", values["recipe"])] if facts.recipe else []
    return [*note, *((title, values[key]) for title, key in shown.items() if values[key]), *recipe]


def _ends(facts: CardFacts) -> list[str]:
    """Return the suffixes of the class name that name a task, such as `ForSequenceClassification`."""
    return [end for end in TASKS if (facts.architecture or "").endswith(end)]


def _metric_table(facts: CardFacts) -> str:
    rows = [
        (plain(name), f"{facts.dense_metrics[name]:.4f}" if name in facts.dense_metrics else "not measured", f"{v:.4f}")
        for name, v in facts.metrics.items()
    ]
    return table(("metric", "dense", "this model"), rows) or "Not measured."


def _sparsity(facts: CardFacts) -> str:
    rows = [
        (plain(name), f"{size:,}" if size else "not recorded", f"{zeros:.2%}") for name, size, zeros in facts.groups
    ]
    return table(("weights", "parameters", "zeros"), rows) or "Not recorded."


def _layers(facts: CardFacts) -> str | None:
    """Return a table of the kinds of layers; None where all are matrices, which the table of zeros has."""
    if all(group.kind == "matrices" for group in facts.layers):
        return None
    return table(HEAD, [tuple(map(plain, group.row)) for group in facts.layers])


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return "Not measured."
    return table(
        ("forward pass", "median and quartiles, interleaved with dense"), [(k, plain(v)) for k, v in speed.rows]
    )
