"""A config with every default written out, so that two spellings of one configuration compare equal."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..registry import Registry, Spec
from .sparsity import (
    COMPRESSIONS,
    PATTERNS,
    RECONSTRUCTIONS,
    SCHEDULES,
    SCORERS,
    SELECTIONS,
    GroupConfig,
    SparsityConfig,
)


def resolved(config: SparsityConfig) -> dict[str, Any]:
    """Return a sparsity config in plain YAML types, with every option of every scorer, pattern and schedule.

    Example:
        >>> import hf_sparse
        >>> config = hf_sparse.SparsityConfig(sparsity=0.5, scorer="magnitude")
        >>> resolved(config)["groups"][0]["scorer"]
        {'name': 'magnitude'}
    """
    return {"groups": [resolved_group(group) for group in config.groups]}


def resolved_group(group: GroupConfig) -> dict[str, Any]:
    """Return one group in plain YAML types, see `resolved`."""
    out: dict[str, Any] = {}
    registries = {"scorer": SCORERS, "pattern": PATTERNS, "selection": SELECTIONS, "schedule": SCHEDULES}
    registries |= {"reconstruction": RECONSTRUCTIONS, "compress": COMPRESSIONS}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if field.name in ("target_modules", "exclude_modules"):
            if value is not None:  # an alternative spelling: left out where it is not used
                out[field.name] = value.plain()
            continue
        # Left out, so that runs of earlier versions compare equal.
        if field.name in ("reconstruction", "compress") and value is None:
            continue
        if field.name in registries and value is not None:
            value = _resolved_entry(registries[field.name], value)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def _resolved_entry(registry: Registry[Any], spec: Spec) -> dict[str, Any]:
    entry = registry.build(spec)
    return {"name": entry.name, **{f.name: plain(getattr(entry, f.name)) for f in dataclasses.fields(entry) if f.init}}


def plain(value: Any) -> Any:
    """Return a value with lists in place of tuples, also inside."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
