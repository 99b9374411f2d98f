"""What made a training checkpoint: recorded in its `trainer_state.json`, and compared before a resume.

Each part of hf_sparse that decides what a checkpoint holds has a section: "sparsity" for `SparsityCallback`, "run" for
a recipe. `TrainerState.stateful_callbacks` carries the sections, so the Trainer writes them with its state, which comes
last and makes a checkpoint complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ...errors import CheckpointError, RecipeError
from ...registry import nearest

KEY = "hf_sparse"
STATE = "trainer_state.json"
FIXED = ("scorer.name", "pattern", "targets", "exclude")
"""What no resume can change: the stored masks, scores and optimizer state would not fit."""
_MISSING = "not set"


def write_record(state: TrainerState, section: str, facts: Mapping[str, Any]) -> None:
    """Record what makes a run in the state of its Trainer; facts are plain JSON types."""
    recorded: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # a mapping once it is constructed
    recorded.setdefault(KEY, {})[section] = dict(facts)


def recorded_in(state: TrainerState, section: str) -> dict[str, Any]:
    """Return what the state of a Trainer has recorded; empty where it has nothing."""
    recorded: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
    return _section(recorded, section) or {}


def read_record(folder: str | Path, section: str) -> dict[str, Any] | None:
    """Return what a checkpoint says of what made it; None where it has no such section.

    Raises:
        CheckpointError: if its `trainer_state.json` cannot be read.
    """
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the training state {path}: {error}") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"cannot read the training state {path}: expected a mapping, got {type(state).__name__}")
    return _section(state.get("stateful_callbacks"), section)


def _section(recorded: Any, section: str) -> dict[str, Any] | None:
    ours = recorded.get(KEY) if isinstance(recorded, Mapping) else None
    found = ours.get(section) if isinstance(ours, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of mappings, as one mapping with dotted keys.

    Example:
        >>> flatten({"seed": 0, "sparsity": {"groups": [{"sparsity": 0.9, "exclude": []}]}})
        {'seed': 0, 'sparsity.groups.0.sparsity': 0.9, 'sparsity.groups.0.exclude': []}
    """
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def names(key: str, name: str) -> bool:
    """Return whether a name means a dotted key: it is the key, a section around it, or its last part.

    Example:
        >>> [names("training.learning_rate", name) for name in ("training", "learning_rate", "rate")]
        [True, True, False]
    """
    return f".{name}." in f".{key}."


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two flat records, as "old -> new" by key.

    Example:
        >>> changes({"seed": 0, "metric": "f1"}, {"seed": 1, "metric": "f1", "freeze": []})
        {'seed': '0 -> 1', 'freeze': 'not set -> []'}
    """
    # As JSON has them: 1.0 and 1 are the same number, and lists are compared by content.
    return {
        key: f"{_text(old, key)} -> {_text(new, key)}"
        for key in dict.fromkeys([*old, *new])
        if key not in old or key not in new or old[key] != new[key]
    }


def listing(found: Mapping[str, str]) -> str:
    """Return changes as text, on one line."""
    return "; ".join(f"{key}: {text}" for key, text in found.items())


def _text(facts: Mapping[str, Any], key: str) -> str:
    return f"{facts[key]}"[:200] if key in facts else _MISSING


def check_resume(
    folder: str | Path, old: Mapping[str, Any], new: Mapping[str, Any], allow: Sequence[str], how: str
) -> dict[str, str]:
    """Compare what made a checkpoint with the run that is to resume from it, and return the changes that are allowed.

    Args:
        folder: the checkpoint.
        old, new: flat records.
        allow: keys, or sections of keys, that may differ.
        how: where to allow a change, for the message, with `{}` in place of the key.

    Raises:
        CheckpointError: for a difference that is not allowed; the message lists each, as "key: old -> new".
        RecipeError: for a name in `allow` that means no key.
    """
    for name in allow:
        if not any(names(key, name) for key in [*old, *new]):
            known = sorted({part for key in [*old, *new] for part in (key, *key.split("."))})
            raise RecipeError(f"allow: '{name}' is not a key of this run{nearest(name, known)}")
    found = changes(old, new)
    refused = {key: text for key, text in found.items() if not any(names(key, name) for name in allow)}
    fixed = [key for key in found if key not in refused and any(names(key, name) for name in FIXED)]
    if fixed:
        raise CheckpointError(
            f"checkpoint {folder} cannot be resumed with another {', '.join(fixed)} "
            f"({'; '.join(found[key] for key in fixed)}): its masks and optimizer state would not fit. Start a new run"
        )
    if refused:
        example = how.format(next(iter(refused)).rpartition(".")[2])
        raise CheckpointError(
            f"checkpoint {folder} was made by a run that differs from this one: {listing(refused)}. Resume with the "
            f"configuration of the checkpoint, allow a change by its key ({example}), or start a new run"
        )
    return found
