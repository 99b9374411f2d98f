"""A linear layer that holds its weight packed and multiplies by the packed form: for inference only."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import BackendError
from ..modeling.layer_matching import BACK, InRuntimeForm
from ..modeling.zero_preservation import resume_guards, suspend_guards
from .joint import Joint
from .packed_weight import Packed, operand_names

_FP32 = torch.float32


def _casts() -> bool:
    """Return whether autocast would compute a dense matmul in another type, which packed ones do not."""
    return torch.is_autocast_enabled("cpu")


def is_short(x: Tensor, most: int) -> bool:
    """Return whether an input has so few tokens that dense weights are faster.

    Compiled and exported programs take the packed ones: they are made for any number of tokens.

    Args:
        most: elements of such an input, see `PackedLinear.short`.
    """
    return most > 0 and not is_compiling() and x.numel() <= most


class PackedLinear(InRuntimeForm, nn.Module):
    """An `nn.Linear` in runtime form: the same module (name, hooks, bias) with its weight packed in buffers.

    The state dict has the dense `weight`, unpacked. `weight` can be read as a dense copy; changes of the copy are lost.

    Attributes:
        kernel: name of the kernel.
        rows: output rows that share the columns of their nonzeros.
        exact_rows, operand_names, exact_names: see `Packed`.
        joint: of layers that are computed together, what they share; else None.
        order: names of the parameters of the `nn.Linear`, in their order.
        trainable: whether the weight required gradients.
        marks: attributes of the weight parameter.
        dense: the dense parameter in a tuple, if it is kept.
        dense_up_to: token count up to which the dense parameter is multiplied by.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    kernel: str
    rows: int
    exact_rows: int
    operand_names: tuple[str, ...]
    exact_names: tuple[str, ...]
    joint: Joint | None
    order: tuple[str, ...]
    trainable: bool
    marks: dict[str, Any]
    dense: tuple[nn.Parameter, ...]
    dense_up_to: int

    @property
    def packed(self) -> Packed:
        """The packed weight; of layers that are computed together, that of all of them."""
        owner: Any = self if self.joint is None else self.joint.layers[0]
        height = self.out_features if self.joint is None else self.joint.out_features
        buffers = owner._buffers  # attribute look-up of a buffer takes as long as a small matmul
        operands = tuple(map(buffers.__getitem__, owner.operand_names))
        exact = tuple(map(buffers.__getitem__, owner.exact_names)) if owner.exact_names else ()
        negative = buffers["packed_negative"]
        return Packed(owner.kernel, owner.rows, height, self.in_features, operands, negative, exact, owner.exact_rows)

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight."""
        weight = self.packed.dense()
        return weight if self.joint is None else self.joint.part(self, weight).clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`.

        Shapes: `(..., in_features)` -> `(..., out_features)`

        Raises:
            BackendError: in training, with gradients through the layer, or for another dtype or device.
        """
        own = self.__dict__  # a short call takes as long as a few look-ups of attributes of a module
        if (limit := own["dense_up_to"]) and is_short(x, limit * own["in_features"]) and self.takes(x) and not _casts():
            parameters = own["_parameters"]
            bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401  `self.bias` is slow
            return F.linear(x, own["dense"][0], bias)
        self.check(x)
        if self.joint is not None:
            return self.joint.product(self, x)
        return self.packed.multiply(x, self.bias)

    @property
    def short(self) -> int:
        """Largest number of elements of an input for which the dense weight is faster, see `is_short`; 0 = none."""
        return self.dense_up_to * self.in_features

    def takes(self, x: Tensor) -> bool:
        """Return whether `check` raises nothing."""
        gradients = x.requires_grad and torch.is_grad_enabled()
        return not self.training and x.dtype is _FP32 and x.is_cpu and not gradients

    def check(self, x: Tensor) -> None:
        """Raise `BackendError` for what only a dense layer can do."""
        if self.takes(x):
            return
        if self.training:
            raise BackendError(
                "a layer in runtime form (hf_sparse.to_runtime) is in training mode, and cannot train. For inference, "
                "call model.eval(); to train, call hf_sparse.to_dense_runtime(model) before training"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise BackendError(
                "a layer in runtime form (hf_sparse.to_runtime) computes no gradients, and its input requires them. "
                "Use torch.no_grad(), or call hf_sparse.to_dense_runtime(model) before training"
            )
        raise BackendError(
            f"a layer in runtime form computes in float32 on the CPU, got an input in {x.dtype} on {x.device} "
            f"(torch.autocast around the model may be the cause: remove it). To move or cast the model, {BACK}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise BackendError(
                f"`weight` of a layer in runtime form is packed, and cannot be set: {BACK}, then set it and call "
                "hf_sparse.to_runtime(model) again"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Describe the layer in the `repr` of the model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel}, rows={self.rows}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.check_apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise `BackendError` if `_apply` of this function would cast the layer, or move it away from its kernel."""
        probe = fn(torch.zeros(1, dtype=torch.float32, device="cpu"))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise BackendError(
                f"a model in runtime form stays in float32 on the CPU, requested {probe.dtype} on {probe.device}: "
                f"{BACK}, then cast or move it"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight
        for name in self.order:
            if f"{prefix}{name}" in destination:  # the bias may be None
                destination[f"{prefix}{name}"] = destination.pop(f"{prefix}{name}")


def become_packed(
    layers: Sequence[nn.Linear], packed: Packed, keep_dense: bool, dense_up_to: int = 0, form: str = "qkv"
) -> None:
    """Turn a layer, or several with the same input, into packed ones, in place.

    Args:
        packed: their weights, concatenated along the output rows.
        dense_up_to: token count up to which they compute with their dense weights, which are then kept.
        form: of several layers, see `Joint`.
    """
    weights = [cast(nn.Parameter, layer.weight) for layer in layers]
    joint = Joint(cast(Any, layers), form) if len(layers) > 1 else None  # packed ones in a moment
    described: list[dict[str, Any]] = [
        {
            "kernel": packed.kernel,
            "rows": packed.rows,
            "exact_rows": packed.exact_rows,
            "operand_names": operand_names(packed.kernel),
            "exact_names": packed.exact_names,
            "joint": joint,
            "order": tuple(layer._parameters),
            "trainable": weight.requires_grad,
            "marks": dict(vars(weight)),
            "dense": (weight,) if keep_dense or dense_up_to else (),
            "dense_up_to": dense_up_to,
        }
        for layer, weight in zip(layers, weights, strict=True)
    ]
    buffers = packed.buffers()
    # An interruption (Ctrl-C) after any line leaves layers that have their weight: packed beside dense, then the class
    # that reads it, and only then the dense one goes.
    try:
        for layer, attributes in zip(layers, described, strict=True):
            vars(layer).update(attributes)
        layers[0]._non_persistent_buffers_set.update(buffers)
        layers[0]._buffers.update(buffers)
        for layer in layers:
            layer.__class__ = PackedLinear  # type: ignore[assignment]
            _rebind(layer)
        for layer in layers:
            del layer._parameters["weight"]
        suspend_guards(layers)
        for weight in weights if dense_up_to else ():
            weight.requires_grad_(False)  # it computes
    except BaseException:
        _restore(layers, weights)
        raise


_ATTRIBUTES = (
    *("kernel", "rows", "exact_rows", "operand_names", "exact_names"),
    *("joint", "order", "trainable", "marks", "dense", "dense_up_to"),
)
"""What `become_packed` sets on a layer."""


def become_dense(layers: Sequence[PackedLinear]) -> None:
    """Restore packed layers to `nn.Linear`, in place; those that are computed together all at once."""
    weights = [layer.dense[0] if layer.dense else _parameter(layer) for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        if weight.requires_grad != layer.trainable:
            weight.requires_grad_(layer.trainable)
    _restore(layers, weights)


def _restore(layers: Sequence[nn.Module], weights: Sequence[nn.Parameter]) -> None:
    """Make layers `nn.Linear` with these weights, from wherever `become_packed` was interrupted; can be repeated."""
    for layer, weight in zip(layers, weights, strict=True):  # the opposite order of `become_packed`
        parameters = {**layer._parameters, "weight": weight}
        vars(layer)["_parameters"] = {name: parameters[name] for name in vars(layer).get("order", parameters)}
    for layer in layers:
        layer.__class__ = nn.Linear
        _rebind(layer)
    resume_guards(layers)
    for layer in layers:
        state = vars(layer)
        for name in (*state.get("operand_names", ()), "packed_negative", *state.get("exact_names", ())):
            layer._buffers.pop(name, None)
            layer._non_persistent_buffers_set.discard(name)
        for name in _ATTRIBUTES:
            state.pop(name, None)


def is_dispatched(layer: nn.Module) -> bool:
    """Return whether the forward method of a layer was replaced by accelerate alone, which calls the one that it found.

    It does so with the layers of a model that a `device_map` spreads, and moves their inputs.
    """
    found = vars(layer).get("_old_forward")
    return isinstance(found, types.MethodType) and found.__func__ is type(layer).forward


def _rebind(layer: nn.Module) -> None:
    """Let accelerate call the forward method of the class that a layer has now."""
    for name in ("_old_forward", "forward"):  # the latter is that method too, once its hook was removed
        if isinstance(found := vars(layer).get(name), types.MethodType) and found.__self__ is layer:
            vars(layer)[name] = types.MethodType(type(layer).forward, layer)


def _parameter(layer: PackedLinear) -> nn.Parameter:
    weight = nn.Parameter(layer.weight, requires_grad=layer.trainable)
    weight.__dict__.update(layer.marks)
    return weight
