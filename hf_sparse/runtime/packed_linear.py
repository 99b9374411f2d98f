"""A linear layer that holds its weight packed and multiplies by the packed form: for inference only."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError
from ..modeling.layer_matching import BACK, InRuntimeForm
from .packed_weight import PARTS, Kernel, Packed


class PackedLinear(InRuntimeForm, nn.Module):
    """What an `nn.Linear` becomes: the same module (name, hooks, bias), whose weight lies packed in buffers.

    The state dict has the dense `weight`, unpacked. `weight` can be read, as a dense copy: changing that changes
    nothing.

    Attributes:
        kernel: what multiplies.
        rows: output rows that share the columns of their nonzeros.
        joint: of layers that are computed together, what they share; else None.
        order: of the parameters that it had.
        trainable: whether the weight asked for gradients.
        marks: attributes that the parameter had.
        dense: the dense parameter in a tuple, if it is kept.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    values: Tensor
    columns: Tensor
    pointers: Tensor
    negative: Tensor | None
    kernel: Kernel
    rows: int
    joint: Joint | None
    order: tuple[str, ...]
    trainable: bool
    marks: dict[str, Any]
    dense: tuple[nn.Parameter, ...]

    @property
    def packed(self) -> Packed:
        """The packed weight; of layers that are computed together, that of all of them."""
        own = self if self.joint is None else self.joint.layers[0]
        height = self.out_features if self.joint is None else self.joint.out_features
        buffers = own._buffers  # the search for an attribute that is a buffer takes as long as a small product
        return Packed(own.kernel, own.rows, height, self.in_features, *[buffers[name] for name in PARTS])  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight."""
        whole = self.packed.dense()
        return whole if self.joint is None else self.joint.part(self, whole).clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`.

        Shapes: `(..., in_features)` -> `(..., out_features)`

        Raises:
            BackendError: in training, with gradients through the layer, or for another dtype or device.
        """
        self.check(x)
        if self.joint is not None:
            return self.joint.product(self, x)
        return self.packed.multiply(x, self.bias)

    def check(self, x: Tensor) -> None:
        """Raise `BackendError` for what only a dense layer can do."""
        if self.training:
            raise BackendError(
                "a layer in runtime form (hf_sparse.to_runtime) is in training mode, and it cannot train. For "
                "inference, call model.eval(); to train, call hf_sparse.to_dense_runtime(model) before training"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise BackendError(
                "a layer in runtime form (hf_sparse.to_runtime) was given an input that needs gradients, and has none "
                "to give. Use torch.no_grad(), or call hf_sparse.to_dense_runtime(model) before training"
            )
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise BackendError(
                f"a layer in runtime form computes in float32 on the CPU, and was given {x.dtype} on {x.device} (by "
                f"torch.autocast around the model, maybe: leave it out). To move or cast the model, {BACK}"
            )

    def extra_repr(self) -> str:
        """Say what it is."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel}, rows={self.rows}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast or a move would change the packed values for good, or leave them where no kernel is.
        probe = fn(torch.zeros(1))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise BackendError(
                f"a model in runtime form stays in float32 on the CPU, and was asked for {probe.dtype} on "
                f"{probe.device}: {BACK}, then move or cast it (what comes before this layer may have been by now)"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight
        for name in self.order:
            if f"{prefix}{name}" in destination:  # the bias may be None
                destination[f"{prefix}{name}"] = destination.pop(f"{prefix}{name}")


class Joint:
    """What several layers with the same input share: one packed weight, and one product per input.

    The first layer that sees an input computes for all; the others, given the very same tensor, hand out their part. A
    thread sees only its own products. Every part is handed out once, so nothing outlives the forward pass.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        self.heights = [layer.out_features for layer in layers]
        self.out_features = sum(self.heights)
        self.traced: dict[str, Any] = {}
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "traced": {}, "local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local = threading.local()

    def part(self, layer: PackedLinear, whole: Tensor) -> Tensor:
        """Return the rows of one layer."""
        first = sum(self.heights[: self.index(layer)])
        return whole[first : first + layer.out_features]

    def index(self, layer: PackedLinear) -> int:
        """Return which of them a layer is."""
        return next(number for number, own in enumerate(self.layers) if own is layer)

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """Return the output of one layer."""
        # A compiler sees no threads, and cannot look into those of Python.
        held = self.traced if torch.compiler.is_compiling() else self.local.__dict__
        index = self.index(layer)
        if held.get("input") is x and held.get("version") == _version(x) and index in held["parts"]:
            parts = held["parts"]
        else:
            whole = layer.packed.multiply(x, self.bias())
            parts = dict(enumerate(whole.split(self.heights, dim=-1)))
            held["input"], held["version"], held["parts"] = x, _version(x), parts
        out: Tensor = parts.pop(index)
        if not parts:
            held.clear()
        return out

    def bias(self) -> Tensor | None:
        """Return the biases of all layers, one after the other."""
        # Put together at each call: a bias can be changed in place.
        biases = [layer.bias for layer in self.layers]
        return None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])


def _version(x: Tensor) -> int:
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


def become_packed(layers: Sequence[nn.Linear], packed: Packed, keep_dense: bool) -> None:
    """Turn a layer, or several with the same input, into packed ones, in place.

    Args:
        packed: their weights, one above the other.
    """
    made_of: list[PackedLinear] = []
    for number, layer in enumerate(layers):
        order = tuple(layer._parameters)
        weight = layer._parameters.pop("weight")
        assert weight is not None
        layer.__class__ = PackedLinear  # type: ignore[assignment]
        made: Any = layer
        made.order = order
        made.kernel, made.rows, made.joint = packed.kernel, packed.rows, None
        made.trainable, made.marks = weight.requires_grad, dict(vars(weight))
        made.dense = (weight,) if keep_dense else ()
        if number == 0:
            for name in PARTS:
                made.register_buffer(name, getattr(packed, name), persistent=False)
        made_of.append(made)
    if len(made_of) > 1:
        joint = Joint(made_of)
        for made in made_of:
            made.joint = joint


def become_dense(layers: Sequence[PackedLinear]) -> None:
    """Turn packed layers back into `nn.Linear`, in place; those that are computed together all at once."""
    weights = [layer.dense[0] if layer.dense else _parameter(layer) for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        for name in PARTS:
            layer._buffers.pop(name, None)
            layer._non_persistent_buffers_set.discard(name)
        parameters = {**layer._parameters, "weight": weight}
        layer._parameters.clear()
        layer._parameters.update({name: parameters[name] for name in layer.order})
        for name in ("kernel", "rows", "joint", "order", "trainable", "marks", "dense"):
            delattr(layer, name)
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def _parameter(layer: PackedLinear) -> nn.Parameter:
    weight = nn.Parameter(layer.weight, requires_grad=layer.trainable)
    weight.__dict__.update(layer.marks)
    return weight
