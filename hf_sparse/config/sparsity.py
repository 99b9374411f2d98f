"""Intent: what the user asks for. (What a file contains is fact, and lives in `manifest`.)

`SparsityConfig` is one or more `GroupConfig`; each group says which weights, scored how, removed in which pattern,
compared with whom, how many, and along which schedule. Both are strict: an unknown key is an error that names the
nearest known one, and ``from_dict(to_dict(config)) == config``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..registry import Registry, Spec, check_keys
from ..utils.atomic_io import write_text
from ..utils.strict_yaml import dump_yaml, read_yaml

SCORERS: Registry[Any] = Registry("scorer")
PATTERNS: Registry[Any] = Registry("pattern")
SELECTIONS: Registry[Any] = Registry("selection")
SCHEDULES: Registry[Any] = Registry("schedule")
"""The four registries are declared here, on the lowest floor, and filled by the floor above."""


def _as_globs(value: Any, key: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) and glob for glob in globs):
        raise RecipeError(f"{key} is a shell glob or a list of them, not {value!r}")
    return tuple(globs)


def _plain(value: Any) -> Any:
    """Return a copy of what may be changed from outside; what is no spec at all is for the registry to refuse."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Ask for one set of weights to be made sparse in one way.

    Args:
        targets: shell globs over module names (`*.attention.*`); None = all linear layers inside the transformer
            blocks, never embeddings, norms, poolers or task heads. For heads, neurons and layers: over the names of
            attentions and feed-forward parts, or of any of their layers; None = all.
        exclude: shell globs of what to leave dense.
        scorer: how important a weight is ("magnitude", "movement", "soft_movement", "gradient", "taylor", "random").
        pattern: which weights live or die together ("element", "2:4", "row", "column",
            `{"name": "block", "rows": 32, "cols": 32}`, and across several weights "head", "neuron", "layer").
        selection: compared with whom ("uniform", "global", "threshold"); None = what suits scorer and pattern.
        sparsity: fraction of the groups removed, in [0, 1); None where the pattern (n:m) or the selection (threshold
            with a value) decides.
        schedule: sparsity over training ("constant", "linear", "cubic", "stepwise").

    Raises:
        RecipeError: for a sparsity outside [0, 1) or below where its schedule starts, an unknown name or option.

    Example:
        >>> import hf_sparse
        >>> hf_sparse.GroupConfig(sparsity=0.9, scorer="movement").pattern
        'element'
    """

    targets: Sequence[str] | str | None = None
    exclude: Sequence[str] | str = ()
    scorer: Spec = "magnitude"
    pattern: Spec = "element"
    selection: Spec | None = None
    sparsity: float | None = None
    schedule: Spec = "cubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _as_globs(self.targets, "targets"))
        object.__setattr__(self, "exclude", _as_globs(self.exclude, "exclude") or ())
        if self.targets == ():
            raise RecipeError("targets is an empty list, so nothing would be pruned; leave it out for the default")
        for registry, key in ((SCORERS, "scorer"), (PATTERNS, "pattern"), (SCHEDULES, "schedule")):
            object.__setattr__(self, key, _plain(getattr(self, key)))
            registry.build(getattr(self, key))
        if self.selection is not None:
            object.__setattr__(self, "selection", _plain(self.selection))
            SELECTIONS.build(self.selection)
        self._check_sparsity()
        self._check_schedule()

    def _check_sparsity(self) -> None:
        from_pattern = PATTERNS.build(self.pattern).fixed_sparsity
        from_selection = self.selection is not None and SELECTIONS.build(self.selection).decides_sparsity
        if self.sparsity is None:
            if from_pattern is None and not from_selection:
                raise RecipeError("sparsity is missing: give the fraction of weights to remove, as in sparsity=0.9")
            return
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise RecipeError(f"sparsity is a number, not {self.sparsity!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise RecipeError(
                f"sparsity is the fraction of weights removed, at least 0 and below 1, but {self.sparsity} was asked; "
                "write 0.9 for 90 %"
            )
        # The floats of numpy are floats, but neither YAML nor a decimal number can be made of them.
        object.__setattr__(self, "sparsity", float(self.sparsity))
        if from_pattern is not None and abs(from_pattern - self.sparsity) > 1e-9:
            raise RecipeError(
                f"pattern {self.pattern!r} always removes {from_pattern:g} of weights, but sparsity={self.sparsity} "
                "was asked; leave sparsity out, or choose another pattern"
            )
        if from_selection:
            raise RecipeError(
                f"selection {self.selection!r} decides the sparsity by its value, but sparsity={self.sparsity} was "
                "asked too; give one of them"
            )

    def _check_schedule(self) -> None:
        final = self.sparsity if self.sparsity is not None else PATTERNS.build(self.pattern).fixed_sparsity
        initial = SCHEDULES.build(self.schedule).initial
        if final is not None and initial > final:
            raise RecipeError(
                f"schedule {self.schedule!r} starts at initial={initial}, above the final sparsity of {final:g}, but "
                "schedules only rise; lower initial"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without the keys that are at their default."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = _plain(value)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupConfig:
        """Build from plain JSON types.

        Raises:
            RecipeError: for an unknown key, naming the nearest known one.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a group is a mapping with keys such as targets and sparsity, not {data!r}")
        check_keys(data, [field.name for field in dataclasses.fields(cls)], "a group")
        return cls(**data)


class SparsityConfig:
    """Ask for a model to be made sparse: one group by keywords, or several by `groups`.

    Args:
        groups: several groups (`GroupConfig` or mappings with its keys). A weight may be in one group only.
        **group: the keys of the only group, see `GroupConfig`.

    Raises:
        RecipeError: for keywords beside `groups`, unknown keys, names or options, or a sparsity outside [0, 1).

    Example:
        >>> from hf_sparse import SparsityConfig
        >>> config = SparsityConfig(sparsity=0.9, scorer="movement", schedule={"name": "cubic", "begin": 0.2})
        >>> SparsityConfig.from_dict(config.to_dict()) == config
        True
        >>> SparsityConfig(sparsity=0.9, scoer="movement")
        Traceback (most recent call last):
            ...
        hf_sparse.errors.RecipeError: a group has no key 'scoer'; did you mean 'scorer'? Known keys: targets, exclude, \
scorer, pattern, selection, sparsity, schedule.
    """

    groups: tuple[GroupConfig, ...]

    def __init__(self, groups: Sequence[GroupConfig | Mapping[str, Any]] | None = None, **group: Any) -> None:
        if groups is None:
            self.groups = (GroupConfig.from_dict(group),)
            return
        if group:
            raise RecipeError(f"give either groups or the keys of one group, not both: {', '.join(sorted(group))}")
        if not isinstance(groups, (list, tuple)) or not groups:
            raise RecipeError(f"groups is a list with at least one group, not {groups!r}")
        self.groups = tuple(g if isinstance(g, GroupConfig) else GroupConfig.from_dict(g) for g in groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparsityConfig) and self.groups == other.groups

    def __repr__(self) -> str:
        return f"SparsityConfig(groups={[group.to_dict() for group in self.groups]})"

    def to_dict(self) -> dict[str, Any]:
        """Return `{"groups": [...]}` in plain JSON types."""
        return {"groups": [group.to_dict() for group in self.groups]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """Build from plain JSON types: `{"groups": [...]}` or the keys of one group.

        Raises:
            RecipeError: for anything but a mapping, and as the constructor.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a sparsity section is a mapping, not {data!r}")
        keys = [field.name for field in dataclasses.fields(GroupConfig)]
        check_keys(data, ["groups", *keys], "a group")
        return cls(**data)

    @classmethod
    def from_recipe(cls, path: str | os.PathLike[str]) -> SparsityConfig:
        """Read the `sparsity` section of a YAML recipe; the other sections are for `hf-sparse train`.

        Raises:
            RecipeError: if the file is not valid YAML (see `utils.strict_yaml`), or has no `sparsity` section.
        """
        data = read_yaml(path)
        if not isinstance(data, Mapping) or not isinstance(data.get("sparsity"), Mapping):
            raise RecipeError(f"recipe {os.fspath(path)} has no 'sparsity' section")
        return cls.from_dict(data["sparsity"])

    def to_recipe(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML recipe that holds only this config, as its `sparsity` section."""
        write_text(path, dump_yaml({"sparsity": self.to_dict()}))
