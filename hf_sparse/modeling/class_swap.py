"""Change what a module computes, in place: its class is swapped for a subclass of it, and restored later.

Parameters, submodule names, hooks and `isinstance` stay as they are; copies and pickles keep the swapped class. This is
the only place of the package that assigns `__class__` of a module for behavior (layers that change their storage do so
in `runtime/packed_linear.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn


class Swapped:
    """Mixin of modules whose class was swapped by `swap_class`.

    Attributes:
        mixin: the subclass of `Swapped` that was mixed in last.
        plain_class: the class before that; it may be a swapped one itself.
        method: name of the method that the mixin's `swapped_call` replaces; None if the mixin defines it by name.
        instance_attributes: what the mixin stores on the module, removed by `restore`.
    """

    mixin: ClassVar[type[Swapped]]
    plain_class: ClassVar[type[nn.Module]]
    method: ClassVar[str | None]
    instance_attributes: ClassVar[tuple[str, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, _lineage(type(self)), self.__dict__  # type: ignore[arg-type]


_Step = tuple[type[Swapped], str | None]

_CLASSES: dict[tuple[type[Swapped], type[nn.Module], str | None], type[nn.Module]] = {}


def swap_class(module: nn.Module, mixin: type[Swapped], method: str | None = None) -> None:
    """Let a module behave as `mixin` defines, and otherwise as before. A second swap to the same mixin does nothing.

    Args:
        method: name of the method that `mixin.swapped_call` replaces, for mixins that serve several classes.

    Example:
        >>> class Doubled(Swapped):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> layer = nn.Identity()
        >>> swap_class(layer, Doubled)
        >>> layer(1.5), isinstance(layer, nn.Identity)
        (3.0, True)
        >>> restore(layer, Doubled)
        >>> layer(1.5), type(layer) is nn.Identity
        (1.5, True)
    """
    if not isinstance(module, mixin):
        module.__class__ = _class(mixin, type(module), method)


def restore(model: nn.Module, mixin: type[Swapped]) -> None:
    """Undo the swaps to `mixin` and its subclasses in a model, as far as they are the last ones of a module."""
    for module in model.modules():
        while isinstance(module, Swapped) and issubclass(module.mixin, mixin):
            for name in module.mixin.instance_attributes:
                vars(module).pop(name, None)
            module.__class__ = module.plain_class  # type: ignore[assignment]


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as if no class had been swapped."""
    cls = type(module)
    while issubclass(cls, Swapped):
        cls = cls.plain_class
    return cls


def swaps_of(module: nn.Module) -> Iterator[type[Swapped]]:
    """Yield the mixins of a module, the last one first."""
    cls = type(module)
    while issubclass(cls, Swapped):
        yield cls.mixin
        cls = cls.plain_class


def _class(mixin: type[Swapped], plain: type[nn.Module], method: str | None) -> type[nn.Module]:
    key = (mixin, plain, method)
    if key not in _CLASSES:
        members: dict[str, Any] = {
            "mixin": mixin,
            "plain_class": plain,
            "method": method,
            "__module__": mixin.__module__,
        }
        if method is not None:
            members[method] = mixin.swapped_call  # type: ignore[attr-defined]
        _CLASSES[key] = type(f"{mixin.__name__}{plain.__name__}", (mixin, plain), members)
    return _CLASSES[key]


def _lineage(cls: type[nn.Module]) -> tuple[Any, ...]:
    """Return the class without swaps and the steps that lead from it to `cls`: what a pickle can name."""
    steps: list[_Step] = []
    while issubclass(cls, Swapped):
        steps.append((cls.mixin, cls.method))
        cls = cls.plain_class
    return cls, tuple(reversed(steps))


def _new(plain: type[nn.Module], steps: tuple[_Step, ...]) -> nn.Module:
    for mixin, method in steps:
        plain = _class(mixin, plain, method)
    return plain.__new__(plain)
