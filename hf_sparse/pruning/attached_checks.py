"""What a Pruner checks at each step of the model and the optimizer that it was attached to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import RecipeError, SparsityError
from .masked_weight import masked_weight
from .unit import Member

Edge = tuple[nn.Module, str, nn.Module]


class Presence:
    """Check that the layers with masks are still those of the model: a replaced one would train dense, unnoticed.

    Args:
        model: that the masks are on.
        members: the masked weights.
    """

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self._model, self._members = model, list(members)
        self._edges = self._find_edges()

    def check(self) -> None:
        """Raise unless every layer is in the model, with its mask.

        Raises:
            SparsityError: naming the first layer that is not.
        """
        # Looking at the modules on the way down costs microseconds, walking through the whole model milliseconds.
        if all(parent._modules.get(key) is child for parent, key, child in self._edges) and self._edges:
            return
        present = set(self._model.modules())
        for member in self._members:
            if member.module not in present or masked_weight(member.module, member.attribute) is not member.masked:
                layer = member.name.removesuffix(".weight")
                raise SparsityError(
                    f"'{layer}' was replaced after its mask was put on, so the model has a layer there that is not "
                    "pruned. Replace layers before Pruner.attach (with a Trainer: before the Trainer is made)"
                )
        self._edges = self._find_edges()  # wrapped by something that keeps the layer inside, as adapters do

    def _find_edges(self) -> list[Edge]:
        ancestors_of: set[nn.Module] = set()
        for member in self._members:
            ancestors_of.update((member.module, *member.module.modules()))
        above: dict[nn.Module, tuple[nn.Module, str]] = {}
        for parent in self._model.modules():
            for key, child in parent._modules.items():
                if child is not None:
                    above.setdefault(child, (parent, key))
        edges: dict[tuple[int, str], Edge] = {}
        for module in ancestors_of:
            child = module
            while child is not self._model and child in above:
                parent, key = above[child]
                if (id(parent), key) in edges:
                    break
                edges[id(parent), key] = (parent, key, child)
                child = parent
        return list(edges.values())


class SteppedOptimizers:
    """Check that the learned scores are in an optimizer, once one has trained the weights under the masks.

    An optimizer that was made before `attach` has the weights, which stay the same parameters, but not the scores: they
    would stay 0, and the masks would keep the first groups whatever they are.

    Args:
        weights: the dense weights under the masks; none = there are no scores to check.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = {id(weight) for weight in weights}
        self._trained: set[int] = set()
        self._handle: Any = None
        if self._weights:
            note = weakref.WeakMethod(self._note)
            self._handle = register_optimizer_step_post_hook(
                lambda optimizer, *_: method(optimizer) if (method := note()) is not None else None
            )

    def _note(self, optimizer: Optimizer) -> None:
        self._trained.update(id(parameter) for group in optimizer.param_groups for parameter in group["params"])

    def check(self, scores: Sequence[Tensor]) -> None:
        """Raise if the weights were trained and the scores were not; after the first trained step, do nothing.

        Raises:
            RecipeError: if no optimizer that has stepped has all of the scores.
        """
        if self._handle is None or not self._weights & self._trained:
            return
        missing = sum(id(score) not in self._trained for score in scores)
        self.close()
        if missing:
            raise RecipeError(
                f"the optimizer has the weights of the model but not the learned scores of {missing} of "
                f"{len(scores)} weights, so these would never learn. Make the optimizer after Pruner.attach, of "
                "Pruner.parameter_groups()"
            )

    def close(self) -> None:
        """Stop watching optimizers."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __del__(self) -> None:
        self.close()

    # Optimizers are watched for one Pruner; a copy of it checks nothing.
    def __deepcopy__(self, memo: dict[int, Any]) -> SteppedOptimizers:
        return SteppedOptimizers([])
