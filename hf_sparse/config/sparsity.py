"""What a user requests: `SparsityConfig`, one or more `GroupConfig`. What a file contains is in `formats.manifest`.

A group states which weights, the scorer, the pattern, the selection, how many, and the schedule. Both are strict: an
unknown key is an error that names the nearest known one, and ``from_dict(to_dict(config)) == config``.
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
from ..utils.text import shorten
from ..utils.validation import check_number, is_number
from .module_names import ModuleNames, NamePattern

SCORERS: Registry[Any] = Registry("scorer")
PATTERNS: Registry[Any] = Registry("pattern")
SELECTIONS: Registry[Any] = Registry("selection")
SCHEDULES: Registry[Any] = Registry("schedule")
RECONSTRUCTIONS: Registry[Any] = Registry("reconstruction")
COMPRESSIONS: Registry[Any] = Registry("compression")
"""The six registries are declared here, on the lowest floor, and filled by the floor above."""


def _as_globs(value: Any, key: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) and glob for glob in globs):
        raise RecipeError(f"`{key}` must be a shell glob or a list of them, got {shorten(value)}")
    return tuple(globs)


def _plain(value: Any) -> Any:
    """Return a copy of what may be changed from outside; the registry refuses what is not a spec."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Request one set of weights to be made sparse in one way.

    Args:
        targets: shell globs over module names (`*.attention.*`); None = all linear layers inside the transformer
            blocks, never embeddings, norms, poolers or task heads. For heads, neurons and layers: over the names of
            attentions and feed-forward parts, or of any of their layers; None = all.
        exclude: shell globs of what to leave dense.
        target_modules: instead of `targets`, as PEFT spells it: a regular expression over whole names, a list of
            names or of their last parts ("query", "output.dense"), or "all-linear".
        exclude_modules: the same of what to leave dense, beside `exclude`.
        scorer: importance of a weight ("magnitude", "movement", "soft_movement", "gradient", "taylor", "random"; in
            one shot, with calibration data, "wanda" and "sparsegpt").
        pattern: which weights are kept or removed together ("element", "2:4", "row", "column", "4x1" for
            `{"name": "block", "rows": 4, "cols": 1}`, and across several weights "head", "neuron", "layer").
        selection: among which groups scores are compared ("uniform", "per_row", "global", "threshold", "owl"); None =
            the default of scorer and pattern.
        sparsity: fraction of the groups removed, in [0, 1); None where the pattern (n:m) or the selection (threshold
            with a value) decides.
        schedule: sparsity over training ("constant", "linear", "cubic", "stepwise").
        reconstruction: in one shot, how the weights that are kept make up for the others ("cg"); None = they stay.
        compress: another form of the layers: `{"name": "hashed", "ratio": 1/8}` in place of a sparse weight,
            `{"name": "low_rank", "rank": 16}` in its place, or with a sparsity beside it; None = a plain weight.

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
    target_modules: Sequence[str] | str | ModuleNames | None = None
    exclude_modules: Sequence[str] | str | ModuleNames | None = None
    reconstruction: Spec | None = None
    compress: Spec | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _as_globs(self.targets, "targets"))
        object.__setattr__(self, "exclude", _as_globs(self.exclude, "exclude") or ())
        for key in ("target_modules", "exclude_modules"):
            object.__setattr__(self, key, ModuleNames.of(getattr(self, key), key))
        if self.targets == ():
            raise RecipeError("`targets` must have at least one glob, got []; leave it out for the default")
        if self.targets is not None and self.target_modules is not None:
            raise RecipeError(
                f"give `targets` or `target_modules`, not both: got {self.targets} and {self.target_modules}"
            )
        for key in ("scorer", "pattern", "schedule", "selection", "reconstruction", "compress"):
            object.__setattr__(self, key, _plain(getattr(self, key)))
        SCORERS.build(self.scorer)
        if self.compress is not None:
            COMPRESSIONS.build(self.compress)
        if not self.prunes:
            self._check_unpruned()
            return
        if self.reconstruction is not None:
            RECONSTRUCTIONS.build(self.reconstruction)
        selection = None if self.selection is None else SELECTIONS.build(self.selection)
        fixed = PATTERNS.build(self.pattern).fixed_sparsity
        self._check_sparsity(fixed, selection is not None and selection.decides_sparsity)
        self._check_schedule(self.sparsity if self.sparsity is not None else fixed)

    @property
    def prunes(self) -> bool:
        """Whether the layers keep a sparse weight; False where `compress` puts something else in its place."""
        fixed = PATTERNS.build(self.pattern).fixed_sparsity
        return self.compress is None or self.sparsity is not None or fixed is not None

    def _check_unpruned(self) -> None:
        """Refuse options of a sparse weight where there is none."""
        given = [key for key in ("scorer", "pattern", "selection", "schedule", "reconstruction") if self._changed(key)]
        if given:
            raise RecipeError(
                f"`compress` without a sparsity puts another form in the place of the weight, so `{given[0]}` has no "
                "meaning: leave it out, or give a sparsity"
            )

    def _changed(self, key: str) -> bool:
        default = type(self).__dataclass_fields__[key].default
        return bool(getattr(self, key) != default)

    @property
    def target_names(self) -> tuple[NamePattern, ...] | None:
        """What the group targets: globs, or the names that PEFT would match; None = the default."""
        if isinstance(self.target_modules, ModuleNames):
            return (self.target_modules,)
        return None if self.targets is None else tuple(self.targets)

    @property
    def exclude_names(self) -> tuple[NamePattern, ...]:
        """What the group leaves dense."""
        more = (self.exclude_modules,) if isinstance(self.exclude_modules, ModuleNames) else ()
        return (*self.exclude, *more)

    def _check_sparsity(self, of_pattern: float | None, of_selection: bool) -> None:
        if self.sparsity is None:
            if of_pattern is None and not of_selection:
                raise RecipeError("`sparsity` is missing: give the fraction of weights to remove, as in sparsity=0.9")
            return
        if is_number(self.sparsity) and not 0 <= self.sparsity < 1:
            raise RecipeError(f"`sparsity` must be in [0, 1), got {self.sparsity}; write 0.9 for 90 %")
        check_number("sparsity", self.sparsity, "[0, 1)")
        # NumPy's floats are floats, but neither YAML nor a decimal number can be made of them.
        object.__setattr__(self, "sparsity", float(self.sparsity))
        if of_pattern is not None and abs(of_pattern - self.sparsity) > 1e-9:
            raise RecipeError(
                f"`sparsity` must be {of_pattern:g} or left out with pattern {self.pattern!r}, got {self.sparsity}"
            )
        if of_selection:
            raise RecipeError(
                f"`sparsity` must be left out with selection {self.selection!r}, whose value decides it, got "
                f"{self.sparsity}"
            )

    def _check_schedule(self, final: float | None) -> None:
        initial = SCHEDULES.build(self.schedule).initial
        if final is not None and initial > final:
            raise RecipeError(
                f"`initial` of schedule {self.schedule!r} must not be above the final sparsity of {final:g}, got "
                f"{initial}: schedules only rise"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without the keys that are at their default."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = value.plain() if isinstance(value, ModuleNames) else _plain(value)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupConfig:
        """Build from plain JSON types.

        Raises:
            RecipeError: for an unknown key, naming the nearest known one.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a group must be a mapping with keys such as targets and sparsity, got {shorten(data)}")
        check_keys(data, [field.name for field in dataclasses.fields(cls)], "a group")
        return cls(**data)


class SparsityConfig:
    """Request a model to be made sparse: one group by keywords, or several by `groups`.

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
scorer, pattern, selection, sparsity, schedule, target_modules, exclude_modules, reconstruction, compress.
    """

    groups: tuple[GroupConfig, ...]

    def __init__(self, groups: Sequence[GroupConfig | Mapping[str, Any]] | None = None, **group: Any) -> None:
        if groups is None:
            self.groups = (GroupConfig.from_dict(group),)
            return
        if group:
            raise RecipeError(f"give either groups or the keys of one group, not both: {', '.join(sorted(group))}")
        if not isinstance(groups, (list, tuple)) or not groups:
            raise RecipeError(f"`groups` must be a list with at least one group, got {shorten(groups)}")
        self.groups = tuple(g if isinstance(g, GroupConfig) else GroupConfig.from_dict(g) for g in groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparsityConfig) and self.groups == other.groups

    def __repr__(self) -> str:
        return f"SparsityConfig(groups={[group.to_dict() for group in self.groups]})"

    def to_dict(self) -> dict[str, Any]:
        """Return `{"groups": [...]}` in plain JSON types."""
        return {"groups": [group.to_dict() for group in self.groups]}

    @classmethod
    def of(cls, config: SparsityConfig | Mapping[str, Any]) -> SparsityConfig:
        """Return a config as it is, and a mapping with its keys as a config.

        Raises:
            RecipeError: for anything else, and as the constructor.

        Example:
            >>> SparsityConfig.of({"sparsity": 0.5}) == SparsityConfig.of(SparsityConfig(sparsity=0.5))
            True
        """
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            raise RecipeError(f"a config must be a SparsityConfig or a mapping with its keys, got {shorten(config)}")
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """Build from plain JSON types: `{"groups": [...]}` or the keys of one group.

        Raises:
            RecipeError: for anything but a mapping, and as the constructor.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a sparsity section must be a mapping, got {shorten(data)}")
        keys = [field.name for field in dataclasses.fields(GroupConfig)]
        check_keys(data, ["groups", *keys], "a group")
        return cls(**data)

    @classmethod
    def from_recipe(cls, path: str | os.PathLike[str]) -> SparsityConfig:
        """Read the `sparsity` section of a YAML recipe; the other sections are for `hf-sparse train`.

        Raises:
            RecipeError: if the file is not a YAML mapping, or does not have a `sparsity` section.
        """
        data = read_yaml(path)
        if not isinstance(data, Mapping) or not isinstance(data.get("sparsity"), Mapping):
            raise RecipeError(f"recipe {os.fspath(path)} has no 'sparsity' section")
        return cls.from_dict(data["sparsity"])

    def to_recipe(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML recipe that holds only this config, as its `sparsity` section."""
        write_text(path, dump_yaml({"sparsity": self.to_dict()}))
