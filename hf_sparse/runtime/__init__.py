"""Runtime form: the sparse layers of a model packed and multiplied as such, for inference, and back."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from ..architectures import known_sub_blocks
from ..errors import BackendError
from ..kernels import library_status
from ..latency import machine
from . import attention, blocks
from .choosing import LEAST, TOKENS, Choice, Unit, measure, survey, units, wins
from .layers import PackedLinear, become_dense, become_packed
from .packed import Kernel
from .report import LayerReport, RuntimeReport
from .timing import MARGIN, SpeedTable

__all__ = ["BACKENDS", "LayerReport", "RuntimeReport", "SpeedTable", "is_runtime", "to_dense_runtime", "to_runtime"]

Backend = Literal["auto", "cpu", "csr", "dense"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_FROZEN = "hf_sparse_runtime_frozen"


@torch.no_grad()
def to_runtime(
    model: nn.Module, backend: str = "auto", keep_dense: bool = False, *, table: SpeedTable | None = None
) -> RuntimeReport:
    """Pack the sparse linear layers of a model for inference, in place, where that is faster.

    Known feed-forward parts and the query, key and value of self-attention become one product each. The model computes
    what it did (to rounding), saves what it did, and cannot train: no parameter asks for gradients until
    `to_dense_runtime`. A model of which nothing is packed stays as it is.

    Args:
        backend: "auto" times each distinct shape once on this machine, and packs what is faster than dense by 3 % at
            every number of tokens timed; "cpu" packs every sparse layer for the own kernels; "csr" for torch's CSR;
            "dense" packs nothing, and says what there is.
        keep_dense: keep the dense weights too, so that going back gives the same parameter objects.
        table: where times are kept.

    Returns:
        What became of each layer; `print` it.

    Raises:
        BackendError: if no layer has zeros enough, the model cannot be packed (still masked, quantised, offloaded,
            not float32, not on the CPU, packed already), or "cpu" is asked for and the kernels are missing.
        SparsityError: if the file of the times cannot be written.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.75))
        >>> hf_sparse.to_runtime(model, "csr").sparse[0].kernel
        'csr'
        >>> hf_sparse.to_dense_runtime(model)
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend is {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    status = library_status()
    if backend == "cpu" and not status.available:
        raise BackendError(
            f"backend 'cpu' was asked for, and the kernels are missing: {status.message} (backend 'auto' does without)"
        )
    choices = survey(model)
    _refuse_nothing(model, choices)
    dense_bytes = {name: choice.layer.weight.nbytes for name, choice in choices.items()}
    shapes = {name: tuple(choice.layer.weight.shape) for name, choice in choices.items()}
    chosen: list[Unit] = []
    if backend == "dense":
        for choice in choices.values():
            choice.reason = choice.reason or "backend 'dense' was asked for"
    else:
        kernel: Kernel = "cpu" if backend == "cpu" or (backend == "auto" and status.available) else "csr"
        timed = (table or SpeedTable()) if backend == "auto" else None
        tokens = (1, *TOKENS) if _generates(model) else TOKENS
        for alternatives in units(model, choices, kernel):
            chosen += _best(alternatives, choices, timed, tokens)
    if chosen:
        _swap(model, chosen, keep_dense)
    layers = []
    for name, choice in choices.items():
        unit = next((unit for unit in chosen if name in unit.names), None)
        rows = size = 0
        if unit is None:
            size = dense_bytes[name]
        else:
            position = unit.names.index(name)
            whole = unit.packed[position if len(unit.packed) > 1 else 0]
            rows = whole.rows
            # What is packed as one is shared out by height.
            share = 1.0 if len(unit.packed) == len(unit.names) else shapes[name][0] / whole.out_features
            size = round(whole.nbytes * share) + (dense_bytes[name] if keep_dense else 0)
        layers.append(
            LayerReport(
                name,
                shapes[name],
                choice.sparsity,
                choice.kernel,
                rows,
                size,
                dense_bytes[name],
                choice.gains,
                choice.reason,
            )
        )
    return RuntimeReport(backend, machine(), status.message, tuple(layers))


@torch.no_grad()
def to_dense_runtime(model: nn.Module) -> None:
    """Bring a model back from its runtime form: plain `nn.Linear` with the weights it had, bit for bit, that can train.

    Raises:
        BackendError: if it is not in runtime form.
    """
    if not is_runtime(model):
        raise BackendError(
            f"to_dense_runtime was asked for a {type(model).__name__} that is not in runtime form: none of its layers "
            "is packed"
        )
    attention.restore(model)
    blocks.restore(model)
    done: set[int] = set()
    for module in list(model.modules()):
        if isinstance(module, PackedLinear) and id(module) not in done:
            together = module.joint.layers if module.joint is not None else (module,)
            become_dense(together)
            done.update(map(id, together))
    trainable = set(vars(model).pop(_FROZEN, ()))
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)


def is_runtime(model: nn.Module) -> bool:
    """Return whether any layer of a model is packed for inference."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _best(
    alternatives: list[Unit], choices: dict[str, Choice], table: SpeedTable | None, tokens: tuple[int, ...]
) -> list[Unit]:
    """Return the first alternative if it wins, else what wins of its layers; write down why."""
    first, *rest = alternatives
    gains = measure(first, table, tokens) if table is not None else {}
    if wins(gains):
        for name in first.names:
            choices[name].kernel, choices[name].gains = first.kernel, gains
        return [first]
    if rest:
        return [unit for alone in rest for unit in _best([alone], choices, table, tokens)]
    choice = choices[first.names[0]]
    worst = min(gains, key=lambda count: gains[count])
    choice.gains = gains
    choice.reason = (
        f"dense is faster, or less than {MARGIN:.0%} slower: {first.kernel} takes {1 / gains[worst]:.2f} of its time "
        f"at {worst} tokens"
    )
    return []


def _swap(model: nn.Module, chosen: list[Unit], keep_dense: bool) -> None:
    known = known_sub_blocks(model)
    readers = [block for block in known if blocks.kind(block) is blocks.LeanT5]
    attentions = {tuple(block.inputs): block for block in known if block.kind == "attention"}
    vars(model)[_FROZEN] = tuple(name for name, own in model.named_parameters() if own.requires_grad)
    for unit in chosen:
        if unit.kernel == "sparse_qkv":
            become_packed(unit.layers, unit.packed[0], keep_dense)
            attention.become_lean(attentions[unit.names])
        else:
            for layer, packed in zip(unit.layers, unit.packed, strict=True):
                become_packed([layer], packed, keep_dense)
        if unit.kernel == "sparse_ffn":
            assert unit.block is not None
            blocks.become_lean(unit.block, unit.activation)
    for block in readers:  # T5 looks at the dtype of the last weight in each pass, which would unpack it
        if isinstance(block.output, PackedLinear) and blocks.kind(block) is not None:
            blocks.become_lean(block, None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _refuse_nothing(model: nn.Module, choices: dict[str, Choice]) -> None:
    if any(choice.reason is None for choice in choices.values()):
        return
    most = max(choices.items(), key=lambda item: item[1].sparsity, default=None)
    found = (
        "it has no linear layer"
        if most is None
        else f"the sparsest of its {len(choices)} linear layers, '{most[0]}', has {most[1].sparsity:.1%} zeros and "
        f"stays dense: {most[1].reason}"
    )
    raise BackendError(
        f"to_runtime was asked for a {type(model).__name__} in which nothing is sparse: {found}. It takes layers with "
        f"at least {LEAST:.0%} zeros; prune the model first (hf_sparse.sparsify, or SparsityCallback)"
    )


def _generates(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False
