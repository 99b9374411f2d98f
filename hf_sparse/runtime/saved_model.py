"""Describe a model in runtime form, and bring one into it from packed tensors: nothing is packed, nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import BackendError, CheckpointError
from ..kernels import KERNELS
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..modeling.class_swap import plain_class_of
from ..modeling.layer_matching import InRuntimeForm
from ..modeling.model_state import sparse_weights
from . import fused_ffn, lm_head
from .candidates import JOINT, Form, PackCandidate
from .convert import fuse_all, unfused_blocks
from .fused_ffn import FusedFeedForward
from .lm_head import Copy, FewTokenLinear
from .packed_linear import PackedLinear
from .packed_weight import EXACT, Packed, operand_names
from .saved_form import REMEDY, SavedRuntime, SavedUnit, isa_here

EXACT_NAMES = tuple(f"exact_{part}" for part in KERNELS[EXACT].layout.parts)
"""Buffers of an exact weight beside the operands of a kernel that rounds."""

Read = Callable[[str], Tensor | None]
"""Name of a tensor -> the tensor, or None if there is none of that name."""


def describe(model: nn.Module) -> tuple[SavedRuntime, dict[str, Tensor]]:
    """Return what a file has to say of a model in runtime form, and its tensors by name.

    Raises:
        BackendError: if a layer is packed for a GPU, a weight is not in memory, or the layers of a fused sub-block were
            replaced.
    """
    names = {id(module): name for name, module in model.named_modules()}
    units: list[SavedUnit] = []
    tensors, shared = _own_tensors(model)
    for form, layers in _packed_units(model):
        packed = [layers[0].packed] if form in JOINT else [layer.packed for layer in layers]
        heights = tuple(each.rows for each in packed), tuple(each.exact_rows for each in packed)
        if gone := [layer for layer in layers if id(layer) not in names]:
            there = next((names[id(layer)] for layer in layers if id(layer) in names), type(gone[0]).__name__)
            raise _replaced(there)
        own, limit = tuple(names[id(layer)] for layer in layers), layers[0].dense_up_to
        unit = SavedUnit(form, packed[0].kernel, own, *heights, limit)
        units.append(unit)
        if limit:
            tensors |= {_dense_key(name): layer.dense[0].detach() for name, layer in zip(own, layers, strict=True)}
        for owner, each in zip(unit.owners, packed, strict=True):
            stored = {_key(owner, part, each.kernel): value for part, value in each.buffers().items()}
            tensors |= {key: value for key, value in stored.items() if value is not None}
    head, copied = _few_token_layer(model)
    if copied is not None:
        tensors |= dict(zip(_copy_keys(head, copied[0]), copied[1], strict=True))
    kernels = {unit.kernel for unit in units} | ({copied[0]} if copied is not None else set())
    kernels |= {EXACT} if any(max(unit.exact_rows) for unit in units) else set()
    saved = SavedRuntime(
        plain_class_of(model).__name__,
        isa_here(),
        {name: KERNELS[name].layout.version for name in sorted(kernels)},
        tuple(units),
        head,
        copied[0] if copied is not None else "",
        shared,
        {name: int(_weight(model, name).count_nonzero()) for name in sparse_weights(model)},
    )
    return saved, tensors


def restore(model: nn.Module, saved: SavedRuntime, read: Read) -> None:
    """Bring a model into runtime form, in place.

    Args:
        model: with all its parameters but the weights that are packed: of those, the shape counts.
        read: the tensors that `describe` has returned.

    Raises:
        CheckpointError: if the description or a tensor does not fit the model.
    """
    blocks = {names: block for block in known_sub_blocks(model) for names in _layers_of(block)}
    unfused = unfused_blocks(model)
    candidates = [_candidate(model, unit, blocks, read) for unit in saved.units]
    head = _linear(model, saved.lm_head) if saved.lm_head else None
    copied = _copy(saved, head, read) if head is not None and saved.copy else None
    for candidate in candidates:
        if candidate.dense_up_to:
            _put_dense(candidate, read)
        candidate.pack(candidate.layers, keep_dense=False)
    if head is not None:
        lm_head.use_few_token_kernel(head, copied)
    fuse_all(model, candidates, unfused)


def packed_tensors(saved: SavedRuntime) -> set[str]:
    """Return the names that the tensors of packed weights may have; all others are those of the model itself."""
    found = set(_copy_keys(saved.lm_head, saved.copy)) if saved.copy else set()
    for unit in saved.units:
        parts = (*operand_names(unit.kernel), "packed_negative", *EXACT_NAMES)
        found |= {_key(owner, part, unit.kernel) for owner in unit.owners for part in parts}
        found |= {_dense_key(name) for name in unit.layers if unit.dense_up_to}
    return found


def _replaced(where: str) -> BackendError:
    return BackendError(
        f"save_runtime got a model whose layers in '{where}', or packed with it, were replaced after to_runtime: call "
        "hf_sparse.to_dense_runtime(model), and hf_sparse.to_runtime(model) again"
    )


def _packed_units(model: nn.Module) -> Iterator[tuple[Form, tuple[PackedLinear, ...]]]:
    """Yield what is packed together."""
    done: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FusedFeedForward) and module.fused_ffn.activation is not None:
            fused = module.fused_ffn
            if any(modules.get(link) is not child for modules, link, child in fused.parts.links):
                raise _replaced(name)
            done.update(map(id, fused.layers))
            yield "ffn", fused.layers
    for name, module in model.named_modules():
        if not isinstance(module, InRuntimeForm) or id(module) in done:
            continue
        if not isinstance(module, PackedLinear):
            raise BackendError(f"save_runtime got a model whose layer '{name}' is packed for a GPU: it saves for CPUs")
        layers: tuple[PackedLinear, ...] = (module,) if module.joint is None else module.joint.layers  # type: ignore[assignment]
        done.update(map(id, layers))
        yield "linear" if module.joint is None else cast(Form, module.joint.form), layers


def _own_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the parameters and persistent buffers by name, and the names of those that are another one too."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = {name: own for name, own in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, own in (module._parameters | kept).items():
            if own is None:
                continue
            place = f"{path}.{name}".strip(".")
            if own.is_meta:
                raise BackendError(f"save_runtime got a model whose '{place}' is offloaded: load the whole model first")
            if id(own) in first:
                shared[place] = first[id(own)]
            else:
                first[id(own)], tensors[place] = place, own.detach()
    return tensors, shared


def _few_token_layer(model: nn.Module) -> tuple[str, Copy | None]:
    """Return name and copy of the LM head that the GEMV kernel reads; no name if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, FewTokenLinear):
            copied = module.few_token_copy
            return name, copied if module.few_token_stamp.fits(module.weight) else None
    return "", None


def _weight(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(path), own)
    return weight


def _key(owner: str, part: str, kernel: str) -> str:
    """Return the name of a tensor. The first takes that of the weight: whoever does not know us finds another shape."""
    return f"{owner}.{'weight' if part == operand_names(kernel)[0] else part}"


def _dense_key(layer: str) -> str:
    return f"{layer}.dense_weight"


def _put_dense(candidate: PackCandidate, read: Read) -> None:
    """Give layers the dense weights that they compute short calls with."""
    for name, layer in zip(candidate.names, candidate.layers, strict=True):
        weight, shape = read(_dense_key(name)), (layer.out_features, layer.in_features)
        if weight is None or weight.dtype != torch.float32 or weight.shape != shape:
            raise CheckpointError(f"the runtime form lacks '{_dense_key(name)}' of shape {shape} in float32: {REMEDY}")
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)


def _copy_keys(head: str, kernel: str) -> list[str]:
    return [f"{head}.few_token_{part}" for part in KERNELS[kernel].layout.parts]


def _layers_of(block: SubBlock) -> Iterator[tuple[str, ...]]:
    """Yield the layers of a sub-block that may be packed together."""
    yield tuple(block.inputs)
    if block.kind == "feed_forward":
        yield (*block.inputs, block.output_name)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if type(layer) is not nn.Linear:
        kind = "no layer" if layer is None else f"a {type(layer).__name__}"
        raise CheckpointError(f"the runtime form packs '{name}', which is {kind} in a {type(model).__name__}: {REMEDY}")
    return layer


def _candidate(
    model: nn.Module, unit: SavedUnit, blocks: Mapping[tuple[str, ...], SubBlock], read: Read
) -> PackCandidate:
    layers = tuple(_linear(model, name) for name in unit.layers)
    block, activation = blocks.get(unit.layers) if unit.form != "linear" else None, None
    if unit.form != "linear":
        kind = {"qkv": "attention", "ffn": "feed_forward", "gate_up": "feed_forward"}[unit.form]
        kernel = KERNELS[unit.kernel]
        able = kernel.fused or (unit.form in JOINT and kernel.joins is not None)
        shared = block is not None and (unit.form != "gate_up" or fused_ffn.shares_input(block))
        if block is None or block.kind != kind or not able or not shared:
            raise CheckpointError(
                f"the runtime form computes {', '.join(unit.layers)} together, which this hf_sparse does not know in a "
                f"{type(model).__name__}: {REMEDY}"
            )
        activation = fused_ffn.activation_of(block) if unit.form == "ffn" and fused_ffn.is_fusible(block) else None
        if unit.form == "ffn" and activation is None:
            raise CheckpointError(
                f"the activation of {', '.join(unit.layers)} is one that no kernel computes: {REMEDY}"
            )
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    if unit.form in JOINT:
        sizes = [(sum(height for height, _ in sizes), sizes[0][1])]
    described = zip(unit.owners, unit.rows, unit.exact_rows, sizes, strict=True)
    packed = tuple(_packed(unit.kernel, owner, rows, exact, size, read) for owner, rows, exact, size in described)
    return PackCandidate(unit.form, unit.kernel, unit.layers, layers, packed, block, activation, unit.dense_up_to)


def _packed(kernel: str, owner: str, rows: int, exact_rows: int, size: tuple[int, int], read: Read) -> Packed:
    """Return a packed weight whose tensors fit together, and lead nowhere outside of it."""
    height, width = size
    names = (*operand_names(kernel), *(EXACT_NAMES if exact_rows else ()))
    found: dict[str, Tensor] = {}
    for part in names:
        tensor = read(_key(owner, part, kernel))
        if tensor is None:
            raise CheckpointError(f"the runtime form lacks the tensor '{_key(owner, part, kernel)}'")
        found[part] = tensor
    operands = tuple(found[part] for part in operand_names(kernel))
    exact = tuple(found[part] for part in names[len(operands) :])
    packed = Packed(kernel, rows, height, width, operands, read(f"{owner}.packed_negative"), exact, exact_rows)
    _check(Packed(kernel, rows, height, width, packed.operands), owner)
    if packed.exact:
        _check(Packed(EXACT, exact_rows, height, width, packed.exact), owner)
    negative = packed.negative
    if negative is not None and (negative.dtype != torch.uint8 or negative.shape != (-(-height * width // 8),)):
        raise CheckpointError(f"the signs of the zeros of '{owner}' are not one bit for each of {height} x {width}")
    return packed


def _check(packed: Packed, owner: str) -> None:
    """Refuse tensors that a kernel would not take, or that lead outside of the weight."""
    kernel = KERNELS[packed.kernel]
    if packed.rows not in kernel.heights:
        raise CheckpointError(f"'{owner}' is packed in blocks of {packed.rows} rows, which '{kernel.name}' has not")
    try:
        if kernel.layout.check is not None:
            kernel.layout.check(packed.operands, packed.rows, packed.out_features, packed.in_features)
        packed.multiply(torch.zeros(1, packed.in_features), None)
    except (BackendError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"the packed weight of '{owner}' is corrupted: {error}") from None


def _copy(saved: SavedRuntime, head: nn.Linear, read: Read) -> Copy:
    parts = [read(key) for key in _copy_keys(saved.lm_head, saved.copy)]
    if any(part is None for part in parts):
        raise CheckpointError(f"the runtime form lacks a tensor of the copy of '{saved.lm_head}'")
    copied = tuple(part for part in parts if part is not None)
    _check(Packed(saved.copy, 1, head.out_features, head.in_features, copied), saved.lm_head)
    return saved.copy, copied
