"""The mask on a weight: a torch parametrisation, so that an `nn.Linear` stays an `nn.Linear`.

While a weight is masked, `module.weight` is the masked weight and `hidden(module)` the dense one underneath, which the
optimizer trains. Some modules hold several weights, or call them otherwise (stacked experts): then the name of the
attribute goes with the module. How such a module looks in a state dict is in `mask_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..errors import RecipeError
from ..modeling.masked_values import mask_values, masks_by_bits
from ..modeling.model_state import MASKS_BESIDE
from .freed_weights import free_between_passes
from .patterns import Pattern
from .shards import mean_as, placed_as


class _Masked(torch.autograd.Function):
    """Forward `W * M`; backward `dL/dW = dL/dW' * M`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _kept_values(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _kept_values(gradients[0], mask), None


class _StraightThrough(torch.autograd.Function):
    """Forward `W * M`; backward `dL/dW = dL/dW' * M` and `dL/dS = dL/dW' * W`, pooled to the groups of S.

    Without a mask (None), `W * 1`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.pattern, ctx.dtype = pattern, scores.dtype
        ctx.sharded = scores if isinstance(scores, DTensor) else None  # of a model that was sharded before it had any
        return _kept_values(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, mask = ctx.saved_tensors
        for_weight = _kept_values(gradient, mask) if ctx.needs_input_grad[0] else None
        for_scores = None
        if ctx.needs_input_grad[1]:
            for_scores = ctx.pattern.pool(gradient * weight, "sum").to(ctx.dtype)
            for_scores = for_scores if ctx.sharded is None else mean_as(for_scores, ctx.sharded)
        return for_weight, for_scores, None, None


class _Watched(torch.autograd.Function):
    """Forward `W * M`; backward `dL/dW = dL/dW' * M`, with the dense `dL/dW'` handed to the mask on the way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None, owner: MaskedWeight) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.owner = owner
        return _kept_values(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (mask,) = ctx.saved_tensors
        ctx.owner.gather(gradient)
        return _kept_values(gradient, mask), None, None


def apply_mask(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return `W * M` with exact zeros; without a mask, the weight."""
    if mask is None:
        return weight.view_as(weight)
    gathered = isinstance(mask, DTensor) and not isinstance(weight, DTensor)  # the backward pass gathers it again
    if gathered or masks_by_bits(weight):
        return _Masked.apply(weight, mask)  # type: ignore[no-untyped-call]
    return _kept_values(weight, mask)


def _kept_values(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.view_as(values) if mask is None else mask_values(values, placed_as(mask, values))


class MaskedWeight(nn.Module):
    """The parametrisation: `W -> W * M`, with exact zeros where `M` is False.

    Several weights can share one mask: a head is rows of three weights and columns of a fourth, its exit. Then a
    removed group is masked at the exit alone while gradients flow; nothing of it gets out, so the model computes the
    same, but the gradient of what *would* come out still reaches the score and the group can come back. With its rows
    zero as well, that gradient would be zero for ever. All else (evaluation, state dicts, `bake`) sees all the zeros.

    Args:
        weight: the weight it will be put on; only its shape, dtype and device are read.
        pattern: which entries form a group.
        fields: what a state dict holds of the method beside the mask, `StateField`s.
        shared: numbers of the method that all its masks share and that have to be in a checkpoint.
        exit: the mask of the weight by which the groups leave, if this is another weight of the same groups. It owns
            the scores.

    Attributes:
        mask: sharded as the dense weight is, once that is and the mask was renewed; each forward pass then gathers it.
        scores: learned scores, one per group, if the method has them.
        watching: whether to gather the dense gradient of backward passes, in `gathered`.
    """

    mask: Tensor
    scores: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        pattern: Pattern,
        fields: Sequence[Any] = (),
        shared: Mapping[str, Tensor] | None = None,
        exit: MaskedWeight | None = None,  # noqa: A002  what it is
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self._exit = (exit,)  # in a tuple, so that it does not become a submodule of this one
        self.fields = tuple(fields)
        self.shared = dict(shared or {})
        self.gathered: Tensor | None = None
        self.watching = False
        self.order: tuple[str, ...] = ()  # of the parameters of the module, before the mask
        self.prefix = ""  # of the keys in the last state dict, the first one of a module with several names
        self.owner: tuple[nn.Module, ...] = ()  # the module that it is put on, in a tuple, as `_exit`
        self.attribute = "weight"  # of that module
        self.made: list[Tensor] | None = None  # in the forward pass of that module
        self.sealed = False  # the zeros are permanent, and nothing continues
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))
        self.register_parameter("scores", None)

    def forward(self, weight: Tensor) -> Tensor:
        (leader,) = self._exit
        scores = self.scores if leader is None else leader.scores
        mask = self.mask if leader is None or self.sealed or not torch.is_grad_enabled() else None
        shown: Tensor
        if scores is not None:
            shown = _StraightThrough.apply(weight, scores, mask, self.pattern)  # type: ignore[no-untyped-call]
        elif self.watching and weight.requires_grad and torch.is_grad_enabled():
            shown = _Watched.apply(weight, mask, self)  # type: ignore[no-untyped-call]
        else:
            shown = apply_mask(weight, mask)
        if self.made is not None and isinstance(mask, DTensor) and not isinstance(weight, DTensor):
            self.made.append(shown)
        return shown

    @torch.no_grad()
    def place(self, weight: Tensor) -> None:
        """Divide what there is for each entry over the processes as the dense weight is divided, if it is."""
        if not isinstance(weight, DTensor):
            return
        if not isinstance(self.mask, DTensor):
            self.free_between_passes()
        for name, buffer in self._buffers.items():  # the mask, and the importance of scorers of gradients
            if buffer is not None and not isinstance(buffer, DTensor):
                self._buffers[name] = placed_as(buffer, weight).clone()  # a shard alone would keep the whole in memory
        if self.gathered is not None and not isinstance(self.gathered, DTensor):
            self.gathered = mean_as(self.gathered, weight)

    def layout(self, weight: Tensor) -> Tensor:
        """Return a tensor that is divided over the processes as the weight is."""
        return weight

    def dense_of(self, weight: Tensor) -> Tensor:
        """Return the dense weight under the mask, without its history.

        Args:
            weight: the parameter.
        """
        return weight.detach()

    @torch.no_grad()
    def renew(self, kept: Tensor, weight: Tensor) -> None:
        """Take a new mask, whole or sharded as the dense weight is."""
        self.place(weight)
        self.mask.copy_(placed_as(kept, self.mask))

    def keep_all(self) -> None:
        """Remove nothing."""
        self.mask.fill_(True)

    def seal(self) -> None:
        """Note that the zeros are permanent, and that nothing continues."""
        self.sealed = True

    def zero_beside(self, bias: nn.Parameter, removed: Tensor) -> None:
        """Make the entries of a bias zero that belong to removed groups, in place: optimizers know the parameter."""
        bias.data.masked_fill_(placed_as(removed, bias), 0.0)

    def free_between_passes(self) -> None:
        """Keep no masked weight for the backward pass, now that weight and mask are sharded."""
        for module in self.owner:
            free_between_passes(module, self)

    def gather(self, gradient: Tensor) -> None:
        """Add the dense gradient of one backward pass (several per optimizer step under gradient accumulation).

        Where the mask is sharded, the processes reduce it here, and each keeps its shard of the mean.
        """
        gradient = gradient.detach().to(torch.float32, copy=True)
        if isinstance(self.mask, DTensor):
            gradient = mean_as(gradient, self.mask)
        self.gathered = gradient if self.gathered is None else self.gathered.add_(gradient)

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, learned={self.scores is not None}, exit={self._exit[0] is None}"


def masked_weight(module: nn.Module, attribute: str = "weight") -> MaskedWeight | None:
    """Return the mask on a weight of a module, or None if it has none."""
    if not parametrize.is_parametrized(module, attribute):
        return (MASKS_BESIDE.get(module) or {}).get(attribute)
    first = module.parametrizations[attribute][0]  # type: ignore[index]
    return first if isinstance(first, MaskedWeight) else None


def masks_on(module: nn.Module) -> dict[str, MaskedWeight]:
    """Return all masks on a module, by the name of the weight; not those on modules inside it."""
    beside: dict[str, MaskedWeight] = MASKS_BESIDE.get(module) or {}
    if not parametrize.is_parametrized(module):
        return dict(beside)
    found = {name: masked_weight(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
    return {name: masked for name, masked in found.items() if masked is not None} | beside


def hidden(module: nn.Module, attribute: str = "weight") -> nn.Parameter:
    """Return the dense weight under the mask, the parameter that the optimizer trains."""
    if not parametrize.is_parametrized(module, attribute):  # the mask is beside it
        return module._parameters[attribute]  # type: ignore[return-value]
    parameter: nn.Parameter = module.parametrizations[attribute].original  # type: ignore[index,union-attr]
    return parameter


def check_free(module: nn.Module, where: str, attribute: str = "weight", sharded: bool = False) -> None:
    """Raise `RecipeError` if a weight cannot be given a mask: it has one, is not in memory, quantized, or divided.

    Args:
        where: its name.
        sharded: whether it may be divided over processes.
    """
    if parametrize.is_parametrized(module, attribute):
        raise RecipeError(
            f"'{where}' already has a mask or another parametrisation. One callback or Pruner at a time: bake the "
            "first, or exclude the weight here"
        )
    weight = getattr(module, attribute)
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise RecipeError(
            f"'{where}' is not in memory (meta device: not loaded, or offloaded by a device_map), so it cannot be "
            "pruned. Load the model first; one that is larger than the memory is pruned from file to file, block by "
            "block, by hf_sparse.sparsify_checkpoint"
        )
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else weight.shape
    if not weight.is_floating_point() or weight.shape != shape:
        raise RecipeError(
            f"'{where}' is quantized ({weight.dtype}), so it cannot be pruned. Load the model without quantization"
        )
    if isinstance(weight, DTensor) and not sharded:
        raise RecipeError(
            f"'{where}' is sharded already, so it cannot be given a mask: that works under fully_shard (FSDP2) in "
            "training, not under tensor parallelism or for calibration. Put masks on first (Pruner.attach, or a "
            "Trainer with SparsityCallback), or prune with sparsify before the model is sharded"
        )
