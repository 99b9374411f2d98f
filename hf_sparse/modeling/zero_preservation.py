"""Zero preservation: training a sparse model further keeps its zeros, with any optimizer of torch and any forward pass.

Two mechanisms, and no mask that is stored between steps:

* A gradient hook on each guarded weight sets the gradient of its zeros to 0. Clipping by norm, momentum and second
  moments are then computed as if those entries did not exist.
* Hooks around `step` of every `torch.optim.Optimizer` note which entries of the guarded weights are zero before the
  step, and set them to 0 after it. This covers optimizers that mix entries (Muon, LAMB-like, low-rank projections), and
  momentum from before the guard. It needs no forward pass of the layer (`F.linear(x, layer.weight)`).

The layers stay plain. Copies (`copy.deepcopy`, `pickle`, EMA) are guarded too: the guard is an attribute of
the module, while hooks on parameters are dropped by copies; the copy gets its gradient hook in its first forward pass
or optimizer step. The optimizer hooks are installed with the first guard and removed with the last.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..errors import RecipeError, SparsityError
from .layer_kinds import Slot
from .masked_values import mask_values, mask_values_
from .model_state import DECODE, ZERO_GUARD

logger = logging.getLogger(__name__)


def keep_zeros(weights: Iterable[nn.Module | Slot], nonzeros: Iterable[int | None] | None = None) -> None:
    """Keep the entries of these weights that are zero at zero in training, until `free_zeros`.

    Args:
        weights: a layer stands for its `weight`.
        nonzeros: of each weight, for `warn_of_lost_zeros`; None = they are counted here.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[0.0, 1.0]]))
        >>> keep_zeros([layer])
        >>> layer(torch.ones(2)).backward()
        >>> layer.weight.grad.tolist()
        [[0.0, 1.0]]
    """
    slots = [_slot(weight) for weight in weights]
    counts = [None] * len(slots) if nonzeros is None else list(nonzeros)
    for slot, count in zip(slots, counts, strict=True):
        guards = _guards(slot.module)
        if not guards:
            ZERO_GUARD.set(slot.module, guards)
            slot.module.register_forward_pre_hook(_arm)
            slot.module.register_load_state_dict_post_hook(_read_again)
        if slot.attribute not in guards:
            guards[slot.attribute] = _Guard(slot, _count(slot) if nonzeros is None else count)
        weight = slot.parameter
        if weight is not None and weight.requires_grad and not weight.is_meta:
            guards[slot.attribute].arm(weight)


def free_zeros(weights: Iterable[nn.Module | Slot]) -> None:
    """Let all entries of these weights train again, and remove every hook that kept them at zero."""
    for slot in map(_slot, weights):
        guards = _guards(slot.module)
        guard = guards.pop(slot.attribute, None)
        if guard is not None:
            guard.disarm()
        if guard is not None and not guards:
            layer = slot.module
            ZERO_GUARD.pop(layer)
            _guarded.discard(layer)
            _remove_hook(layer)
            for key in [key for key, hook in layer._load_state_dict_post_hooks.items() if hook is _read_again]:
                del layer._load_state_dict_post_hooks[key]
    if not _guarded:
        _step_hooks.remove()


def suspend_guards(layers: Iterable[nn.Module]) -> None:
    """Take the forward hook off guarded layers that have no weight to train for a while: it costs time in each call."""
    for layer in layers:
        if _guards(layer):
            _remove_hook(layer)


def resume_guards(layers: Iterable[nn.Module]) -> None:
    """Put the forward hook back on guarded layers."""
    for layer in layers:
        if _guards(layer) and not any(map(is_guard, layer._forward_pre_hooks.values())):
            layer.register_forward_pre_hook(_arm)


def _remove_hook(layer: nn.Module) -> None:
    for key in [key for key, hook in layer._forward_pre_hooks.items() if is_guard(hook)]:
        del layer._forward_pre_hooks[key]


def keeps_zeros(weight: nn.Module | Slot) -> bool:
    """Return whether the zeros of this weight stay zero."""
    slot = _slot(weight)
    return slot.attribute in _guards(slot.module)


def _slot(weight: nn.Module | Slot) -> Slot:
    return Slot(weight) if isinstance(weight, nn.Module) else weight


def _guards(layer: nn.Module) -> dict[str, _Guard]:
    """Return the guards of the weights of a module, by attribute."""
    guards: dict[str, _Guard] | None = ZERO_GUARD.get(layer)
    return {} if guards is None else guards


def warn_of_lost_zeros(model: nn.Module) -> None:
    """Warn, once for all of them, of guarded weights with more nonzeros than when they were pruned or loaded.

    Nothing puts zeros back after something that is not an optimizer step has written to a weight: `weight.data.add_`,
    `load_state_dict` of a dense model.
    """
    lost = {}
    for path, layer in model.named_modules():
        for attribute, guard in _guards(layer).items():
            slot = Slot(layer, attribute)
            now = None if guard.count is None else _count(slot)
            if guard.count is not None and now is not None and now > guard.count:
                lost[slot.name(path)] = now - guard.count
    if lost:
        logger.warning(
            f"{sum(lost.values())} zeros of {len(lost)} sparse weights (first: {next(iter(lost))}) were overwritten "
            "since the model was pruned or loaded, by something that is not an optimizer, and are saved as they are "
            "now. Prune again to restore the sparsity, or call hf_sparse.fill(model) before such a change"
        )


def _count(slot: Slot) -> int | None:
    """Return the nonzeros of a weight; None where it is not in memory, lazy, or sharded."""
    weight = slot.parameter
    if weight is None or weight.is_meta or DECODE.get(weight) is not None or isinstance(weight, DTensor):
        return None
    return int(torch.count_nonzero(weight.detach()))


def is_guard(hook: object) -> bool:
    """Return whether a forward hook is the one that keeps zeros."""
    return hook is _arm


class _Guard:
    """The guard of one weight, held by its module.

    Attributes:
        count: nonzeros of the weight when it was guarded; None where it had no values to count.
        covered: an optimizer step with the hooks of this module around it has trained the weight.
        nonzeros: of the weight at the last backward pass before that.
    """

    def __init__(self, slot: Slot, count: int | None) -> None:
        self._layer, self._attribute = weakref.ref(slot.module), slot.attribute
        self.count = count
        self._handle: RemovableHandle | None = None
        self._armed: int | None = None
        self.covered = False
        self.nonzeros: int | None = None
        _guarded.add(slot.module)
        _step_hooks.install()

    # A copy of the layer has a guard of its own, which knows that copy.
    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self._layer(), "attribute": self._attribute, "count": self.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Slot(state["layer"], state["attribute"]), state.get("count"))  # type: ignore[misc]

    def is_armed(self, weight: Tensor) -> bool:
        """Return whether the gradient hook is on this very parameter; not on one that has replaced it."""
        # The handle holds the hooks of its parameter weakly: an id that a new parameter has taken over does not count.
        return self._armed == id(weight) and self._handle is not None and self._handle.hooks_dict_ref() is not None

    def arm(self, weight: Tensor) -> None:
        """Put the gradient hook on the weight, if it is not there yet."""
        if not self.is_armed(weight):
            self.disarm()
            self._armed, self._handle = id(weight), weight.register_hook(_GradientHook(self))

    def disarm(self) -> None:
        """Remove the gradient hook."""
        if self._handle is not None:
            self._handle.remove()
        self._armed = self._handle = None

    def mask_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with zeros where the weight is zero.

        Raises:
            SparsityError: if zeros were lost since the last backward pass.
        """
        layer = self._layer()
        weight = None if layer is None else Slot(layer, self._attribute).parameter
        if weight is None or gradient.layout != torch.strided:  # a sparse gradient is left to the step hooks
            return gradient
        kept = weight.detach() != 0
        if not self.covered and not (kept.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._check(_local(kept))
        return mask_values(gradient, kept)

    def _check(self, kept: Tensor) -> None:
        # Until the first optimizer step that is covered; later, a GPU would have to wait for this count.
        before, self.nonzeros = self.nonzeros, int(torch.count_nonzero(kept))
        if before is not None and self.nonzeros > before:
            raise SparsityError(
                f"{self.nonzeros - before} zeros of a sparse weight of shape {tuple(kept.shape)} were filled between "
                "two backward passes, by something that is not the `step` of a torch.optim.Optimizer, so they cannot "
                "be kept. Train with an optimizer that is one (torch.optim, transformers, bitsandbytes), or call "
                "hf_sparse.fill(model) if the zeros are meant to train"
            )


class _GradientHook:
    """Call the guard as long as there is one; a parameter must not keep its layer alive."""

    __torch_unserializable__ = True  # without it torch warns for each weight that is sent to another process

    def __init__(self, guard: _Guard) -> None:
        self.guard = weakref.ref(guard)

    def __call__(self, gradient: Tensor) -> Tensor:
        guard = self.guard()
        return gradient if guard is None else guard.mask_gradient(gradient)


def _arm(layer: nn.Module, _: Any) -> None:
    """Forward pre-hook: put the gradient hook on a parameter that is new (a copy, `fully_shard`, a replaced weight)."""
    if torch.compiler.is_compiling():  # the first optimizer step does it then
        return
    for attribute, guard in _guards(layer).items():
        _arm_one(guard, Slot(layer, attribute))


def _arm_one(guard: _Guard, slot: Slot) -> None:
    layer, weight = slot.module, slot.parameter
    if weight is None:
        if isinstance(vars(layer).get(slot.attribute), Tensor):
            _refuse_computed(layer)
    elif weight.requires_grad and not weight.is_meta:
        guard.arm(weight)
    elif weight.requires_grad and layer.training and torch.is_grad_enabled():
        # accelerate brings it in for the forward pass only, as another tensor, whose gradient is thrown away.
        raise RecipeError(
            "a layer whose weight is offloaded cannot train: its gradient would be lost. Load the model onto one "
            "device (without device_map) to train it, or call eval() and torch.no_grad() for inference"
        )


@torch.no_grad()
def _read_again(layer: nn.Module, _: Any) -> None:
    """Load hook: from here on the zeros of the new values stay, and a gradient of the old ones does not touch them."""
    for attribute, guard in _guards(layer).items():
        weight = Slot(layer, attribute).parameter
        if weight is None:
            continue
        guard.nonzeros = None
        if weight.grad is not None and weight.grad.layout == torch.strided:
            mask_values_(_local(weight.grad), _local(weight) != 0)


def _refuse_computed(layer: nn.Module) -> None:
    if layer.training and torch.is_grad_enabled():
        raise RecipeError(
            "the weight of a sparse layer is not a parameter but a tensor computed from others (FSDP version 1, "
            "weight_norm), so its zeros cannot be kept in training. Use fully_shard (fsdp_version: 2), or call "
            "hf_sparse.fill(model) if the zeros are meant to train"
        )


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _StepHooks:
    """Hooks around `step` of every torch optimizer; installed only while a layer is guarded."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        # Steps nest where a subclass calls `super().step()`; each entry belongs to one call.
        self._zeros: weakref.WeakKeyDictionary[Optimizer, list[list[tuple[_Guard, Tensor, Tensor]]]]
        self._zeros = weakref.WeakKeyDictionary()

    def install(self) -> None:
        if not self._handles:
            self._handles = [
                register_optimizer_step_pre_hook(self._before),
                register_optimizer_step_post_hook(self._after),
            ]

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        """Note the zeros of every guarded weight that this optimizer trains."""
        guards: dict[int, _Guard] = {}
        for layer in list(_guarded):
            for attribute, guard in _guards(layer).items():
                weight = Slot(layer, attribute).parameter
                if weight is not None and weight.requires_grad and not weight.is_meta:
                    guards[id(weight)] = guard
        noted = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in guards:
                    guard = guards[id(parameter)]
                    noted.append((guard, parameter, _local(parameter) == 0))
                    _mask_missed_gradient(guard, parameter, noted[-1][-1])
        calls = self._zeros.setdefault(optimizer, [])
        # What a step that raised has left behind.
        depth = sum("step" in vars(cls) for cls in type(optimizer).__mro__ if cls is not Optimizer)
        del calls[: max(0, len(calls) - depth + 1)]
        calls.append(noted)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        """Set what was zero before the step to 0 again."""
        calls = self._zeros.get(optimizer)
        for guard, parameter, zeros in calls.pop() if calls else ():
            guard.covered = True
            mask_values_(_local(parameter), zeros.logical_not_())


def _mask_missed_gradient(guard: _Guard, parameter: Tensor, zeros: Tensor) -> None:
    """Mask a gradient that was computed without the hook, so that the state of the optimizer stays zero there too."""
    if guard.is_armed(parameter):
        return
    gradient = parameter.grad
    if gradient is not None and gradient.layout == torch.strided:
        mask_values_(_local(gradient), ~zeros)
    guard.arm(parameter)


_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_step_hooks = _StepHooks()
