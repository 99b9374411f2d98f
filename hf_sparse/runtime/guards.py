"""What a model in runtime form refuses, before anything of it has changed; and parameters that do not train meanwhile.

A cast reaches the embeddings before it reaches the first packed layer, and `load_state_dict` copies into all plain
layers before it raises. So every module that contains packed layers checks first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import BackendError
from ..modeling.layer_matching import BACK, InRuntimeForm
from ..modeling.model_state import RUNTIME_FROZEN


def freeze(model: nn.Module) -> None:
    """Let no parameter train until `unfreeze`.

    The parameters that did are kept under their names: an adapter may give them another name, and resizing the
    embeddings makes another parameter.
    """
    RUNTIME_FROZEN.set(model, {name: own for name, own in model.named_parameters() if own.requires_grad})
    model.requires_grad_(False)


def unfreeze(model: nn.Module) -> None:
    """Let the parameters train that did before `freeze`, in the model and in models inside of it."""
    for module in list(model.modules()):
        frozen = RUNTIME_FROZEN.pop(module) or {}
        known = {id(own) for own in frozen.values()}
        for name, own in module.named_parameters():
            if (name in frozen or id(own) in known) and not own.is_inference():
                own.requires_grad_(True)


def guard(model: nn.Module) -> None:
    """Let all modules that contain layers in runtime form check casts, moves and loads first."""
    for module in model.modules():
        if not isinstance(module, InRuntimeForm) and any(isinstance(m, InRuntimeForm) for m in module.modules()):
            vars(module)["_apply"] = _GuardedApply(module)
            vars(module)["_load_from_state_dict"] = _GuardedLoad(module)


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in model.modules():
        for name in ("_apply", "_load_from_state_dict"):
            if isinstance(vars(module).get(name), _Guarded):
                del vars(module)[name]


class _Guarded:
    """A method of one module that checks its layers in runtime form first. It does not keep the module alive."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module(),)  # of a copy of the module, the copy

    def owner(self) -> nn.Module:
        """Return the module."""
        module = self.module()
        assert module is not None
        return module

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the layers in runtime form by name."""
        return ((name, m) for name, m in self.owner().named_modules() if isinstance(m, InRuntimeForm))


class _GuardedApply(_Guarded):
    """`nn.Module._apply`, which casts and moves."""

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self.owner()
        for _, layer in self.layers():
            layer.check_apply(fn)
        return type(module)._apply(module, fn, recurse)


class _GuardedLoad(_Guarded):
    """`nn.Module._load_from_state_dict`, which is called before that of the submodules."""

    def __call__(self, state_dict: Any, prefix: str, *args: Any) -> None:
        module = self.owner()
        for name, _ in self.layers():
            if any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                raise BackendError(
                    f"cannot load weights into a {type(module).__name__}: '{prefix}{name}.weight' is packed for "
                    f"inference. To load, {BACK}"
                )
        type(module)._load_from_state_dict(module, state_dict, prefix, *args)
