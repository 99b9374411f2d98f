"""The mask on a weight: a torch parametrisation, so that an `nn.Linear` stays an `nn.Linear`.

While a weight is masked, `module.weight` is the masked weight and `hidden(module)` the dense one underneath, which the
optimizer trains. In a state dict the module looks like this, never like torch's `parametrizations....original`, which
would be loaded as random weights by everyone else:

    weight             the masked weight, what any plain model wants
    weight_kept        bool, True = kept
    weight_hidden      the dense weight underneath
    weight_<state>     whatever the method needs to go on: scores, importance, ...

`load_state_dict` takes these keys, a plain dense `weight` alone, and the form that training checkpoints have on disk:
`weight` packed by the bitmask codec, `weight_kept` as bits, `weight_hidden` the removed values alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from .codecs.base import as_bits, unpack_bits
from .codecs.bitmask import expand
from .errors import CheckpointError, RecipeError
from .patterns import Pattern

STATE_SUFFIXES = ("_kept", "_hidden", "_scores", "_importance", "_strength", "_level", "_renewals")
"""Endings of the keys that only a training that goes on needs; everyone else ignores them."""


class _StraightThrough(torch.autograd.Function):
    """Forward `W * M`; backward `dL/dW = dL/dW' * M` and `dL/dS = dL/dW' * W`, pooled to the groups of S.

    Without a mask (None), `W * 1`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.pattern = pattern
        ctx.dtype = scores.dtype
        return _masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, mask = ctx.saved_tensors
        for_weight = _masked(gradient, mask) if ctx.needs_input_grad[0] else None
        for_scores = None
        if ctx.needs_input_grad[1]:
            for_scores = ctx.pattern.pool(gradient * weight, "sum").to(ctx.dtype)
        return for_weight, for_scores, None, None


class _Watched(torch.autograd.Function):
    """Forward `W * M`; backward `dL/dW = dL/dW' * M`, with the dense `dL/dW'` handed to the mask on the way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None, owner: MaskedWeight) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.owner = owner
        return _masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (mask,) = ctx.saved_tensors
        ctx.owner.gather(gradient)
        return _masked(gradient, mask), None, None


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    # Not `weight * mask`: that makes -0.0 of negative weights and NaN of infinite ones.
    return weight.view_as(weight) if mask is None else torch.where(mask, weight, 0.0)


class MaskedWeight(nn.Module):
    """The parametrisation: `W -> W * M`, with exact zeros where `M` is False.

    Several weights can share one mask: a head is rows of three weights and columns of a fourth, its exit. Then a
    removed group is masked at the exit alone while gradients flow; nothing of it gets out, so the model computes the
    same, but the gradient of what *would* come out still reaches the score and the group can come back. With its rows
    zero as well, that gradient would be zero for ever. All else (evaluation, state dicts, `bake`) sees all the zeros.

    Args:
        weight: the weight it will be put on; only its shape, dtype and device are read.
        pattern: which entries form a group.
        learned: data type of the scores to own, one parameter per group, started at 0; None = the method learns none.
        observes: whether to gather the dense gradient for a scorer that looks at it.
        shared: tensors of the method that all its masks share and that have to be in a checkpoint.
        exit: the mask of the weight by which the groups leave, if this is another weight of the same groups. It owns
            the scores.
    """

    mask: Tensor
    scores: nn.Parameter | None
    importance: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        pattern: Pattern,
        *,
        learned: torch.dtype | None = None,
        observes: bool = False,
        shared: dict[str, Tensor] | None = None,
        exit: MaskedWeight | None = None,  # noqa: A002  what it is
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self._exit = (exit,)  # in a tuple, so that it is no submodule of this one too
        self.shared = shared or {}
        self.gathered: Tensor | None = None
        self.observes = observes
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))
        scores = None
        if learned is not None and exit is None:
            shape = pattern.groups_shape(tuple(weight.shape))
            scores = nn.Parameter(torch.zeros(shape, dtype=learned, device=weight.device))
        self.register_parameter("scores", scores)
        importance = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) if observes else None
        self.register_buffer("importance", importance)

    def forward(self, weight: Tensor) -> Tensor:
        (leader,) = self._exit
        scores = self.scores if leader is None else leader.scores
        mask = self.mask if leader is None or not torch.is_grad_enabled() else None
        if scores is not None:
            return _StraightThrough.apply(weight, scores, mask, self.pattern)  # type: ignore[no-untyped-call]
        if self.observes and weight.requires_grad and torch.is_grad_enabled():
            return _Watched.apply(weight, mask, self)  # type: ignore[no-untyped-call]
        return _masked(weight, mask)

    def gather(self, gradient: Tensor) -> None:
        """Add the dense gradient of one backward pass (several per optimizer step under gradient accumulation)."""
        if self.gathered is None:
            self.gathered = gradient.detach().to(torch.float32, copy=True)
        else:
            self.gathered += gradient.detach()

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, learned={self.scores is not None}, exit={self._exit[0] is None}"


def masked_weight(module: nn.Module) -> MaskedWeight | None:
    """Return the mask on `module.weight`, or None if it has none."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first = module.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, MaskedWeight) else None


def hidden(module: nn.Module) -> nn.Parameter:
    """Return the dense weight under the mask, the parameter that the optimizer trains."""
    parameter: nn.Parameter = module.parametrizations["weight"].original  # type: ignore[index,union-attr]
    return parameter


def check_free(module: nn.Module, where: str) -> None:
    """Raise `RecipeError` if `module.weight` cannot be given a mask: it has one, is not in memory, or is quantized."""
    if parametrize.is_parametrized(module, "weight"):
        raise RecipeError(
            f"'{where}' already has a mask or another parametrisation. One callback or Pruner at a time: bake the "
            "first, or exclude the weight here"
        )
    if isinstance(module.weight, Tensor) and module.weight.is_meta:
        raise RecipeError(f"'{where}' is not in memory (meta device), so it cannot be pruned. Load the model first")
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else weight.shape
    if not weight.is_floating_point() or weight.shape != shape:
        raise RecipeError(
            f"'{where}' is quantized ({weight.dtype}), so it cannot be pruned. Load the model without quantization"
        )


def attach_mask(module: nn.Module, masked: MaskedWeight, where: str) -> None:
    """Put a mask on `module.weight`.

    Raises:
        RecipeError: as `check_free`.
    """
    check_free(module, where)
    parametrize.register_parametrization(module, "weight", masked)
    masked.hooks = (  # type: ignore[assignment]
        module.register_state_dict_post_hook(_plain_keys),
        module.register_load_state_dict_pre_hook(_own_keys),
    )


def bake_mask(module: nn.Module) -> None:
    """Make the zeros part of the weight and take the mask off; the parameter stays the same object."""
    masked = masked_weight(module)
    if masked is None:
        return
    for hook in masked.hooks:  # type: ignore[union-attr]
        hook.remove()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


_INNER = "parametrizations.weight."


def _plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: what torch wrote for the parametrised weight becomes the keys of the module docstring."""
    masked = masked_weight(module)
    assert masked is not None
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(inner)]:
        del state[key]
    state.update({f"{prefix}weight{suffix}": tensor for suffix, tensor in training_state(module).items()})


def training_state(module: nn.Module) -> dict[str, Tensor]:
    """Return what a state dict holds of a masked weight: key suffix -> tensor ("" is the masked weight itself)."""
    masked = masked_weight(module)
    assert masked is not None
    dense = hidden(module).detach()
    mask = masked.mask
    if isinstance(dense, DTensor):  # every process has the whole mask: its own rows need no exchange
        mask = distribute_tensor(mask, dense.device_mesh, dense.placements, src_data_rank=None)
    state = {"": torch.where(mask, dense, 0.0), "_kept": masked.mask, "_hidden": dense}
    if masked.scores is not None:
        state["_scores"] = masked.scores.detach()
    if masked.importance is not None:
        state["_importance"] = masked.importance
    return state | {f"_{name}": tensor.clone() for name, tensor in masked.shared.items()}


def _own_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the keys of the module docstring, dense or packed, become what torch expects."""
    masked = masked_weight(module)
    assert masked is not None
    name = prefix + "weight"
    if name not in state:
        return
    inner = prefix + _INNER
    weight = _unpacked(state.pop(name), state.pop(f"{name}_mask", None), masked.mask.shape, name)
    kept, dense = state.pop(f"{name}_kept", None), state.pop(f"{name}_hidden", None)
    state[inner + "0.mask"] = masked.mask if kept is None else _flags(kept, masked.mask.shape, f"{name}_kept")
    state[inner + "original"] = weight if dense is None else _under(weight, dense, state[inner + "0.mask"], name)
    alone = kept is None and dense is None
    for suffix, present in (("scores", masked.scores), ("importance", masked.importance)):
        if f"{name}_{suffix}" in state:
            state[f"{inner}0.{suffix}"] = state.pop(f"{name}_{suffix}")
        elif alone and present is not None:  # a plain dense weight brings none: what is there stays, as the mask does
            state[f"{inner}0.{suffix}"] = present.detach()
    for suffix, tensor in masked.shared.items():
        if f"{name}_{suffix}" in state:
            given = state.pop(f"{name}_{suffix}")
            if given.shape != tensor.shape or not bool(torch.isfinite(given).all()):
                raise CheckpointError(f"'{name}_{suffix}' is no finite number, so this training cannot go on from it")
            tensor.copy_(given)


def _unpacked(weight: Tensor, mask: Tensor | None, shape: torch.Size, name: str) -> Tensor:
    if weight.shape == shape:
        return weight
    if mask is None or mask.dtype != torch.uint8 or mask.shape != (-(-shape.numel() // 8),):
        raise CheckpointError(
            f"'{name}' has shape {tuple(weight.shape)} and no bitmask that fits {tuple(shape)}. A model that is being "
            "pruned takes training checkpoints and dense weights; load anything else with from_pretrained"
        )
    return expand(mask.cpu().numpy(), as_bits(weight.cpu()), shape.numel()).view(weight.dtype).view(shape)


def _flags(kept: Tensor, shape: torch.Size, name: str) -> Tensor:
    if kept.dtype == torch.bool and kept.shape == shape:
        return kept
    if kept.dtype != torch.uint8 or kept.shape != (-(-shape.numel() // 8),):
        raise CheckpointError(f"'{name}' does not fit the weight of shape {tuple(shape)}")
    return torch.from_numpy(unpack_bits(kept.cpu().numpy(), shape.numel(), name)).view(shape)


def _under(weight: Tensor, dense: Tensor, kept: Tensor, name: str) -> Tensor:
    """Return the dense weight, from itself or from the removed values alone."""
    if dense.shape == weight.shape:
        return dense
    removed = ~kept.to(dense.device)
    if dense.shape != (int(torch.count_nonzero(removed)),):
        raise CheckpointError(
            f"'{name}_hidden' holds {tuple(dense.shape)} values, but {int(removed.sum())} are removed"
        )
    return weight.to(dense.device, copy=True).masked_scatter_(removed, dense)
