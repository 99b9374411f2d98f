"""Which layers of a model can compute packed, in which company, and whether that is faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import BackendError
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..modeling.architectures.base import Changed
from ..modeling.layer_matching import InRuntimeForm
from ..modeling.zero_preservation import is_guard
from . import fused_attention as attention
from . import fused_ffn as blocks
from .autotune import Race, SpeedTable, Trial
from .lazy_weights import arrive, look
from .packed_linear import PackedLinear, become_packed
from .packed_weight import Kernel, Packed, choose_rows

LEAST = 0.1
"""Fraction of zeros below which no kernel is tried: none can win there."""

TOKENS = (17, 65, 200, 1024)
"""Numbers of tokens that are timed: from 16 on, where a tile of tokens has most room that nothing fills."""

FEW = (1, 2, 5, 8)
"""Those of a model that generates, besides: one token for each text."""


@dataclasses.dataclass
class Choice:
    """What was found out about a layer.

    Attributes:
        reason: why it stays dense; None while it can be packed.
        kernel: of the report.
    """

    layer: nn.Linear
    sparsity: float
    reason: str | None = None
    kernel: str = "dense"
    gains: dict[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Layers that are packed together or not at all.

    Attributes:
        kernel: "sparse_linear", "sparse_ffn", "sparse_qkv" or "csr".
        packed: one per layer; of "sparse_qkv" one for all.
        activation: of a feed-forward part.
    """

    kernel: str
    names: tuple[str, ...]
    layers: tuple[nn.Linear, ...]
    packed: tuple[Packed, ...]
    block: SubBlock | None = None
    activation: str | None = None


def survey(model: nn.Module, *, gpu: bool = False) -> dict[str, Choice]:
    """Look at every linear layer of a model.

    Args:
        gpu: whether it is on a GPU, where other types than float32 compute too.

    Raises:
        BackendError: for layers whose weights are not plain numbers in memory, or not of the CPU.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for own in module.parameters(recurse=False):
            owners[id(own)] = owners.get(id(own), 0) + 1
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, InRuntimeForm):
            raise BackendError(
                f"to_runtime was asked for a model that is in runtime form already ('{name}' is packed). Call "
                "hf_sparse.to_dense_runtime(model) first to choose again"
            )
        if not isinstance(module, nn.Linear) and type(module).__name__ not in _FOREIGN:
            continue
        _refuse(name, module, gpu)
        assert isinstance(module, nn.Linear)
        weight = look(module.weight)
        sparsity = 1.0 - int(torch.count_nonzero(weight)) / weight.numel() if weight.numel() else 0.0
        reason = None
        if not weight.numel():
            reason = "it is empty: compaction has removed it"
        elif type(module) is not nn.Linear:
            reason = f"it is a {type(module).__name__}, which may compute in another way than nn.Linear"
        elif owners[id(module._parameters["weight"])] > 1:
            reason = "its weight is shared with another module (tied embeddings)"
        elif "forward" in vars(module):
            reason = "its forward method was replaced on this very module"
        elif sparsity < LEAST:
            reason = f"too few zeros: {sparsity:.1%}, and below {LEAST:.0%} dense is faster"
        found[name] = Choice(module, sparsity, reason)
    return found


_FOREIGN = ("QuantLinear", "MarlinLinear", "BitLinear", "AutoBitLinear", "EetqLinear", "HQQLinear")


def _refuse(name: str, module: nn.Module, gpu: bool) -> None:
    """Raise `BackendError` if a layer is none whose weight can be packed."""
    asked = f"to_runtime was asked for a model whose layer '{name}'"
    if parametrize.is_parametrized(module):
        raise BackendError(
            f"{asked} is still masked or otherwise parametrised. Finish pruning first: Pruner.bake() (the callback "
            "does it at the end of training), or parametrize.remove_parametrizations"
        )
    if name.rpartition(".")[2] == "base_layer":
        raise BackendError(f"{asked} is wrapped in adapters. Merge them first: model = model.merge_and_unload()")
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or type(module).__name__ in _FOREIGN:
        found = type(module).__name__ if weight is None else f"{type(module).__name__} with {weight.dtype}"
        raise BackendError(f"{asked} is quantised ({found}). Load it without quantisation, or call model.dequantize()")
    if weight.is_meta or getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise BackendError(
            f"{asked} is offloaded, or on the meta device: there is no weight to pack. Load it onto the CPU whole, "
            'without device_map or with device_map={"": "cpu"}'
        )
    if gpu:
        return
    if weight.device.type != "cpu":
        raise BackendError(
            f"{asked} is on {weight.device}; the kernels that were asked for are for the CPU. Move it "
            "there: model.to('cpu'), or use backend 'auto'"
        )
    if weight.dtype != torch.float32:
        raise BackendError(
            f"{asked} is in {weight.dtype}; the CPU kernels compute in float32. Cast it: model.float() (or load it "
            "with dtype=torch.float32)"
        )


def units(model: nn.Module, choices: dict[str, Choice], kernel: Kernel) -> Iterator[list[Unit]]:
    """Yield what can be packed: for each sub-block or layer the alternatives, the largest company first.

    The layers of an alternative that loses are looked at one by one, unless they are part of another. Weights that wait
    arrive here; whoever packs a unit before asking for the next one never has more than one unit dense.
    """
    able = {name: choice.layer for name, choice in choices.items() if choice.reason is None}
    packs: dict[str, Packed] = {}
    taken: set[str] = set()

    def alone(name: str) -> Unit:
        if name not in packs:
            layer = able[name]
            arrive([layer])
            packs[name] = Packed.of(layer.weight, kernel, choose_rows(layer.weight) if kernel != "csr" else 1)
        return Unit("sparse_linear" if kernel != "csr" else "csr", (name,), (able[name],), (packs[name],))

    for block in known_sub_blocks(model) if kernel != "csr" else ():
        names = tuple(block.inputs)
        together: Unit | None = None
        packs.clear()
        if block.kind == "attention" and _is_self(block) and all(name in able for name in names):
            layers = tuple(able[name] for name in names)
            if len({layer.bias is None for layer in layers}) == 1 and not any(hooked(layer) for layer in layers):
                arrive(layers)
                weight = torch.cat([layer.weight.detach() for layer in layers])
                together = Unit("sparse_qkv", names, layers, (Packed.of(weight, kernel, choose_rows(weight)),), block)
        elif block.kind == "feed_forward":
            names = (*names, block.output_name)
            activation = blocks.activation_of(block)
            if all(name in able for name in names) and activation and blocks.kind(block) and not _watched(block):
                packed = tuple(alone(name).packed[0] for name in names)
                layers = tuple(able[name] for name in names)
                gated = len(block.inputs) > 1
                if not (gated and any(layer.bias is not None for layer in layers)):
                    together = Unit("sparse_ffn", names, layers, packed, block, activation)
        if together is not None:
            taken.update(names)
            yield [together, *(alone(name) for name in names)]
    for name in able:
        if name not in taken:
            packs.clear()
            yield [alone(name)]


def counts_of(model: nn.Module, tokens: Sequence[int] | None) -> Callable[[Unit], Sequence[int]]:
    """Return what says at which numbers of tokens a unit is timed.

    A model that generates reads one token of each text at every step; its encoder, if it has one, whole texts once.

    Args:
        tokens: those that were asked for; None = what fits the model.
    """
    if tokens is not None:
        asked = sorted(set(tokens))
        return lambda unit: asked
    can = getattr(model, "can_generate", None)
    if not (callable(can) and can()):
        return lambda unit: TOKENS
    reads = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder_of: Any = getattr(model, "get_encoder", None) if reads else None
    whole = set(encoder_of().modules()) if callable(encoder_of) else set()
    return lambda unit: TOKENS if unit.layers[0] in whole else (*FEW, *TOKENS)


def measure(unit: Unit, table: SpeedTable, tokens: Sequence[int]) -> dict[int, Race]:
    """Return what a unit takes, dense and packed, by tokens."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in unit.layers)
    total = sum(layer.weight.numel() for layer in unit.layers)
    shapes = tuple(tuple(layer.weight.shape) for layer in unit.layers)
    rows = tuple(packed.rows for packed in unit.packed)
    kind = unit.kernel
    if (size := _heads(unit)) is not None:
        kind, shapes = "sparse_attention", (*shapes, (unit.layers[0].out_features // size, size))
    races = {}
    for count in tokens:
        x = torch.randn(1, count, unit.layers[0].in_features)
        trial = Trial(kind, shapes, round(100 * zeros / total), rows, count)
        races[count] = table.race(trial, _run(unit, _copies(unit), x), _run(unit, _packed(unit), x))
    return races


def wins(races: dict[int, Race]) -> bool:
    """Return whether the dense product loses at every number of tokens."""
    return all(race.won for race in races.values())


def _copies(unit: Unit) -> list[nn.Module]:
    """Return plain layers with the weights and biases of the unit, but without its hooks."""
    out: list[nn.Module] = []
    for layer in unit.layers:
        made = nn.Linear(layer.in_features, layer.out_features, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        out.append(made.eval())
    return out


def _packed(unit: Unit) -> list[nn.Module]:
    """Return the same, packed as the unit would be: what a call of a module costs counts too."""
    made: list[Any] = _copies(unit)
    if unit.kernel == "sparse_qkv":
        become_packed(made, unit.packed[0], keep_dense=False)
    else:
        for layer, packed in zip(made, unit.packed, strict=True):
            become_packed([layer], packed, keep_dense=False)
    return made


def _run(unit: Unit, layers: list[nn.Module], x: Tensor) -> Callable[[], object]:
    if (size := _heads(unit)) is not None:
        scale, packed = size**-0.5, isinstance(layers[0], PackedLinear)
        whole = partial(attention.mixed, layers[0]) if packed else partial(attention.plain, layers)
        return lambda: whole(size, scale, x)
    if unit.kernel != "sparse_ffn":
        return lambda: [layer(x) for layer in layers]
    assert unit.activation is not None
    fused = all(isinstance(layer, PackedLinear) for layer in layers)
    *inputs, output = layers
    lean = blocks.Lean(tuple(inputs), output, unit.activation if fused else None, blocks.ACTIVATIONS[unit.activation])
    return lambda: lean(x)


def _heads(unit: Unit) -> int | None:
    """Return the size of the heads of an attention whose heads are computed with its product; else None."""
    whole = unit.kernel == "sparse_qkv" and unit.block is not None
    return unit.block.size if whole and unit.block is not None and attention.takes(unit.block) else None


def _is_self(block: SubBlock) -> bool:
    """Return whether query, key and value see the same input: not in cross-attention, and not without heads."""
    core = block.core
    plain = not isinstance(core, Changed) or type(core).__name__.startswith("Uneven")
    return plain and "Cross" not in type(core).__name__ and not block.name.endswith("EncDecAttention")


def hooked(module: nn.Module) -> bool:
    """Return whether a module has forward hooks, but for the one that keeps zeros."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not is_guard(hook) for hook in hooks)


def _watched(block: SubBlock) -> bool:
    """Return whether hooks look at anything inside a feed-forward part, which then has to be computed."""
    inside = [*block.inputs.values(), block.output, *blocks.parts_of(block)]
    function = blocks.function_of(block)
    return any(hooked(module) for module in [*inside, *([function] if isinstance(function, nn.Module) else [])])
