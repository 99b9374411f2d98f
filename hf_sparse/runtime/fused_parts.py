"""Whether the modules below a fused block are still those that it was made of, and whether their calls are observed.

A fused block computes with the weights of its layers without calling them. So it has to notice when a layer is replaced
(by an adapter, `set_submodule`, an assignment) or has hooks, and then computes as the plain module does. It looks in
each call, so looking is cheap: a dictionary entry per path, and a few attributes per module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ..modeling.class_swap import Swapped
from ..modeling.zero_preservation import is_guard


class RuntimeBlock(Swapped):
    """Marker of mixins that `to_dense_runtime` removes, see `hf_sparse.modeling.class_swap`."""


class FusedParts:
    """The modules at some paths below a module, as they were when it was fused.

    Args:
        root: the module.
        paths: of what is computed without a call. Modules on the way to them are parts too.
        functions: paths of plain functions (an activation that is not a module).
    """

    def __init__(self, root: nn.Module, paths: Iterable[str], functions: Iterable[str] = ()) -> None:
        links: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        for path in paths:
            owner = root
            for name in path.split("."):
                child = owner.get_submodule(name)
                links[id(owner), name] = (owner._modules, name, child)
                owner = child
        # The dictionaries themselves: copies and pickles of the model keep them together with the modules.
        self.links = tuple(links.values())
        self.modules = tuple(child for _, _, child in self.links)
        self.functions: tuple[tuple[nn.Module, str, Callable[..., Any]], ...] = tuple(
            (root.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], _attribute(root, path))
            for path in functions
        )

    def intact(self) -> bool:
        """Return whether no part was replaced and the call of none is observed."""
        for modules, name, module in self.links:
            if modules.get(name) is not module:
                return False
        for owner, name, function in self.functions:
            if getattr(owner, name, None) is not function:
                return False
        return not any_observed(self.modules)


def any_observed(modules: Iterable[nn.Module]) -> bool:
    """Return whether the call of one of these modules is observed; hooks for all modules observe each."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(map(is_observed, modules))


def is_observed(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class says: forward hooks, or a replaced forward method.

    The hook that keeps zeros in training does not count.
    """
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if hooks and not all(map(is_guard, hooks.values())):
            return True
    return "forward" in module.__dict__


def child(module: Any, path: str) -> Any:
    """Return a submodule, faster than `get_submodule`: it is done in every call of a fused block."""
    for name in path.split("."):
        module = module._modules[name]
    return module


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
