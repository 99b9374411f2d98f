"""Runtime form: the sparse layers of a model packed and multiplied as such, for inference, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import BackendError
from ..kernels import LibraryStatus, library_status
from ..kernels.int8_ops import why_not_int8
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..modeling.layer_matching import InRuntimeForm
from ..modeling.model_state import RUNTIME_FROZEN
from ..profiling.latency_table import machine
from . import fused_attention as attention
from . import fused_ffn as blocks
from . import gpu
from . import lm_head as vocabulary
from .autotune import MARGIN, SpeedTable
from .lazy_weights import arrive, give_back
from .packed_linear import PackedLinear, become_dense, become_packed
from .packed_weight import Kernel
from .planner import LEAST, Choice, Unit, counts_of, hooked, measure, survey, units, wins
from .report import LayerReport, RuntimeReport

__all__ = ["BACKENDS", "LayerReport", "RuntimeReport", "SpeedTable", "is_runtime", "to_dense_runtime", "to_runtime"]

Backend = Literal["auto", "cpu", "cpu-int8", "csr", "dense"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@torch.no_grad()
def to_runtime(
    model: nn.Module,
    backend: str = "auto",
    keep_dense: bool = False,
    *,
    tokens: Sequence[int] | None = None,
    table: SpeedTable | None = None,
) -> RuntimeReport:
    """Pack the sparse linear layers of a model for inference, in place, where that is faster.

    Known feed-forward parts and the query, key and value of self-attention become one product each; of a model that
    generates, the product with the vocabulary stays dense, and an own kernel reads it for a few tokens. The model
    computes what it did (to rounding; but an infinity or NaN that meets a zero weight is ignored, where dense products
    give NaN), saves what it did, and cannot train: no parameter asks for gradients until `to_dense_runtime`. A model of
    which nothing is packed stays as it is.

    Args:
        backend: "auto" times each distinct shape once on this machine, and packs what is faster than dense by 5 % at
            every number of tokens timed; "cpu" packs every sparse layer for the own kernels; "csr" for torch's CSR;
            "dense" packs nothing, and says what there is. "cpu-int8" is "cpu" with weights and inputs rounded to int8,
            several times faster and **not exact**: the report has the error of each layer, and only you can say what it
            does to your model's answers. "auto" never chooses it. It keeps the exact weights, packed, for the way back.
            A model on a GPU knows "auto" alone: 2:4 and blocks, by kernels that have not been run on a GPU yet.
        keep_dense: keep the dense weights too, so that going back gives the same parameter objects.
        tokens: numbers of tokens (texts times their length) that "auto" times; None = some from 17 to 1024, and for a
            model that generates also from 1 to 8 (but for its encoder, which reads whole texts). A call with fewer than
            the least of them may be slower than dense.
        table: where times are kept.

    Returns:
        What became of each layer; `print` it.

    Raises:
        BackendError: if no layer has zeros enough, the model cannot be packed (still masked, quantised, offloaded,
            not float32, not on the CPU, packed already), or "cpu" is asked for and the kernels are missing, or
            "cpu-int8" and the processor has no AVX-512 with VNNI.
        SparsityError: if the file of the times cannot be written.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.75))
        >>> hf_sparse.to_runtime(model, "csr").sparse[0].kernel
        'csr'
        >>> hf_sparse.to_dense_runtime(model)
    """
    status = library_status()
    _refuse_wish(backend, tokens, status)
    if backend == "auto" and _on_gpu(model):
        return _to_gpu(model, keep_dense, tokens, table or SpeedTable())
    choices = survey(model)
    _refuse_nothing(model, choices)
    dense_bytes = {name: choice.layer.weight.nbytes for name, choice in choices.items()}
    shapes = {name: tuple(choice.layer.weight.shape) for name, choice in choices.items()}
    chosen: list[Unit] = []
    errors: dict[str, float] = {}
    timed = (table or SpeedTable()) if backend == "auto" else None
    if backend == "dense":
        for choice in choices.values():
            choice.reason = choice.reason or "backend 'dense' was asked for"
    else:
        kernel: Kernel = "cpu" if backend == "cpu" or (backend == "auto" and status.available) else "csr"
        kernel = "int8" if backend == "cpu-int8" else kernel
        counts = counts_of(model, tokens)
        trainable = tuple(name for name, own in model.named_parameters() if own.requires_grad)
        readers = [block for block in known_sub_blocks(model) if blocks.kind(block) is blocks.LeanT5]
        try:
            for alternatives in units(model, choices, kernel):
                best = _best(alternatives, choices, timed, counts(alternatives[0]))
                for unit in best:
                    errors.update(_errors(unit) if kernel == "int8" else {})
                    _pack(unit, keep_dense)
                chosen += best
            arrive(model.modules())
            if chosen and backend != "csr" and status.available:
                _read_vocabulary(model, choices, timed, tokens or vocabulary.TOKENS)
        except BaseException:
            if is_runtime(model):
                to_dense_runtime(model)
            raise
        if chosen:
            _freeze(model, trainable, readers)
    arrive(model.modules())
    layers = tuple(
        _layer_report(name, choice, chosen, shapes[name], dense_bytes[name], keep_dense, errors.get(name))
        for name, choice in choices.items()
    )
    return RuntimeReport(backend, machine(), status.message, layers)


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
    vocabulary.restore(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, gpu.GpuLinear):
            model.set_submodule(name, module.back())
    done: set[int] = set()
    for module in list(model.modules()):
        if isinstance(module, PackedLinear) and id(module) not in done:
            together = module.joint.layers if module.joint is not None else (module,)
            become_dense(together)
            done.update(map(id, together))
    trainable = set(RUNTIME_FROZEN.pop(model) or ())
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)


def is_runtime(model: nn.Module) -> bool:
    """Return whether any layer of a model is packed for inference."""
    return any(isinstance(module, InRuntimeForm) for module in model.modules())


def _on_gpu(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.numel()]
    return bool(layers) and all(layer.weight.is_cuda for layer in layers)


def _to_gpu(model: nn.Module, keep_dense: bool, tokens: Sequence[int] | None, table: SpeedTable) -> RuntimeReport:
    """Do what `to_runtime` does, for a model on a GPU: 2:4 and blocks, by kernels that no one has verified yet."""
    choices = survey(model, gpu=True)
    _refuse_nothing(model, choices)
    trainable = tuple(name for name, own in model.named_parameters() if own.requires_grad)
    reports: list[LayerReport] = []
    try:
        _to_gpu_one_by_one(model, choices, reports, keep_dense, tokens or gpu.TOKENS, table)
    except BaseException:
        if is_runtime(model):
            to_dense_runtime(model)
        raise
    if is_runtime(model):
        _freeze(model, trainable, [])
    return RuntimeReport("auto", machine(), "GPU kernels: 2:4 and blocks, not verified yet", tuple(reports))


def _to_gpu_one_by_one(
    model: nn.Module,
    choices: dict[str, Choice],
    reports: list[LayerReport],
    keep_dense: bool,
    tokens: Sequence[int],
    table: SpeedTable,
) -> None:
    for name, choice in choices.items():
        layer, size = choice.layer, choice.layer.weight.nbytes
        if choice.reason is None and hooked(layer):
            choice.reason = "hooks are on it, which a sparse layer would not call"
        if choice.reason is not None:
            shape = tuple(layer.weight.shape)
            reports.append(LayerReport(name, shape, choice.sparsity, "dense", 0, size, size, {}, choice.reason))
            continue
        capability = torch.cuda.get_device_capability(layer.weight.device) if torch.cuda.is_available() else None
        made, report = gpu.choose(name, layer, choice.sparsity, table, tokens, keep_dense, capability)
        reports.append(report)
        if made is not None:
            model.set_submodule(name, made)


def _layer_report(
    name: str,
    choice: Choice,
    chosen: list[Unit],
    shape: tuple[int, ...],
    dense_bytes: int,
    keep_dense: bool,
    error: float | None,
) -> LayerReport:
    rows, size = 0, dense_bytes
    unit = next((unit for unit in chosen if name in unit.names), None)
    if unit is not None:
        whole = unit.packed[unit.names.index(name) if len(unit.packed) > 1 else 0]
        # What is packed as one is shared out by height.
        share = 1.0 if len(unit.packed) == len(unit.names) else shape[0] / whole.out_features
        rows, size = whole.height, round(whole.nbytes * share) + (dense_bytes if keep_dense else 0)
    kernel = choice.kernel if error is None else choice.kernel.replace("sparse", "int8")
    return LayerReport(
        name, shape, choice.sparsity, kernel, rows, size, dense_bytes, choice.gains, choice.reason, error
    )


def _best(
    alternatives: list[Unit], choices: dict[str, Choice], table: SpeedTable | None, tokens: Sequence[int]
) -> list[Unit]:
    """Return the first alternative if it wins, else what wins of its layers; write down why."""
    first, *rest = alternatives
    races = measure(first, table, tokens) if table is not None else {}
    gains = {count: race.gain for count, race in races.items()}
    if wins(races):
        for name in first.names:
            choices[name].kernel, choices[name].gains = first.kernel, gains
        return [first]
    if rest:
        return [unit for alone in rest for unit in _best([alone], choices, table, tokens)]
    choice = choices[first.names[0]]
    worst = min(gains, key=lambda count: (races[count].won, gains[count]))
    choice.gains = gains
    choice.reason = (
        f"dense is faster, or less than {MARGIN:.0%} slower, or not surely so: {first.kernel} takes "
        f"{1 / gains[worst]:.2f} of its time at {worst} tokens"
    )
    return []


def _errors(unit: Unit) -> dict[str, float]:
    """Measure how far the product of each layer is from the exact one; layers that are one product are one here too."""
    if unit.kernel == "sparse_qkv":
        return dict.fromkeys(unit.names, unit.packed[0].error(torch.cat([layer.weight for layer in unit.layers])))
    parts = zip(unit.names, unit.layers, unit.packed, strict=True)
    return {name: packed.error(layer.weight) for name, layer, packed in parts}


def _pack(unit: Unit, keep_dense: bool) -> None:
    if unit.kernel == "sparse_qkv":
        become_packed(unit.layers, unit.packed[0], keep_dense)
        assert unit.block is not None
        attention.become_lean(unit.block)
    else:
        for layer, packed in zip(unit.layers, unit.packed, strict=True):
            become_packed([layer], packed, keep_dense)
    if unit.kernel == "sparse_ffn":
        assert unit.block is not None
        blocks.become_lean(unit.block, unit.activation)
    give_back()


def _freeze(model: nn.Module, trainable: tuple[str, ...], readers: list[SubBlock]) -> None:
    """Let nothing train until the way back, and no T5 look for weights that are packed.

    Args:
        trainable: names of the parameters that did.
        readers: sub-blocks that look at the dtype of their last weight in each pass, which would unpack it.
    """
    RUNTIME_FROZEN.set(model, trainable)
    for block in readers:
        if isinstance(block.output, PackedLinear) and blocks.kind(block) is not None:
            blocks.become_lean(block, None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _read_vocabulary(
    model: nn.Module, choices: dict[str, Choice], table: SpeedTable | None, tokens: Sequence[int]
) -> None:
    layer = vocabulary.vocabulary_of(model)
    choice = next((choice for choice in choices.values() if choice.layer is layer), None)
    if layer is None or choice is None:
        return
    if table is not None:
        races = vocabulary.races(layer, table, tokens)
        choice.gains = {count: race.gain for count, race in races.items()}
        if not vocabulary.pays(races):
            return
    vocabulary.read_fast(layer)
    choice.kernel = vocabulary.KERNEL
    least = min(choice.gains, default=0)
    gained = f", {choice.gains[least]:.1f}x at {least} token{'s' if least > 1 else ''}" if least else ""
    choice.reason = f"dense, with an own kernel for a few tokens{gained} ({choice.reason})"


def _refuse_wish(backend: str, tokens: Sequence[int] | None, status: LibraryStatus) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend is {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    counts = tokens if isinstance(tokens, Sequence) else (None,)
    if tokens is not None and not (counts and all(isinstance(count, int) and count >= 1 for count in counts)):
        raise BackendError(f"tokens names numbers of tokens from 1 on, as in (1, 128), not {tokens!r}")
    if backend == "cpu" and not status.available:
        raise BackendError(
            f"backend 'cpu' was asked for, and the kernels are missing: {status.message} (backend 'auto' does without)"
        )
    if backend == "cpu-int8" and (why := why_not_int8()) is not None:
        raise BackendError(f"backend 'cpu-int8' was asked for, and cannot run here: {why} ('cpu' computes in float32)")


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
