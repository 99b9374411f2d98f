"""Runtime form: the sparse layers of a model packed for the kernels of this machine, for inference, and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import BackendError
from ..kernels import KERNELS, Kernel, library_status
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..modeling.class_swap import restore
from ..modeling.layer_matching import InRuntimeForm
from ..modeling.model_state import check_model
from ..profiling.machine import machine
from . import fused_ffn, gpu, lm_head, rms_norm
from .autotune import DECODING, SpeedTable
from .candidates import Candidates, PackCandidate
from .fused_parts import RuntimeBlock
from .guards import freeze, guard, unfreeze, unguard
from .huge_pages import HugePages
from .lazy_weights import materialize, trim_memory
from .packed_linear import PackedLinear, become_dense
from .packed_weight import RoundingErrors
from .planner import choose, choose_for_decoding, generates, token_counts
from .report import LayerReport, RuntimeReport
from .survey import LayerDecision, refuse_dense, survey, warn_of_others

__all__ = ["BACKENDS", "LayerReport", "RuntimeReport", "SpeedTable", "is_runtime", "to_dense_runtime", "to_runtime"]


def backends() -> tuple[str, ...]:
    """Return what `to_runtime(backend=)` takes: "auto", the kernels of the registry by name, "dense"."""
    return ("auto", *KERNELS.backends, "dense")


BACKENDS = backends()
"""The same, of the kernels of this package."""


@torch.inference_mode(False)  # what is made here outlives the call, and has to be able to train later
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

    Known feed-forward sub-blocks, and query, key and value of self-attention, become one operator each; the LM head of
    a model that generates stays dense, and a GEMV kernel reads it for a few tokens. The outputs stay the same (to
    rounding; but an infinity or NaN that meets a zero weight is ignored, where dense matmuls give NaN), and so do saved
    files. The model cannot train: no parameter requires gradients until `to_dense_runtime`. A layer that is replaced
    afterwards (by an adapter, say) is computed as it is. A model of which nothing is packed stays unchanged. Layers
    that a `device_map` has put elsewhere (offloaded, on another device) stay as they are, and the report says so.

    Args:
        backend: "auto" times each distinct shape once on this machine, and packs what is faster than dense by 5 % at
            every token count that is timed; "cpu" packs every sparse layer for the kernels of this package; "csr" for
            torch's CSR; "dense" packs nothing, and reports what there is. "cpu-int8" is "cpu" with weights and inputs
            rounded to int8, several times faster and **not exact**: the report has the error of each layer, and only
            you can judge the change of your model's outputs. "bitmask", "bitmask-int8" and "bitmask-int4" are for
            models that generate: a bit for each entry, and the values exact, in int8 or in 4 bits; the LM head too, but
            never in less than int8. "auto" tries "bitmask" beside "cpu" there, and never chooses one that rounds. Those
            keep the exact weights, packed, to restore them, unless they lose nothing: those that
            `scorer={"name": "sparsegpt", "bits": 4}` (or 8) left are on their grid. A model on a GPU takes "auto"
            alone: 2:4 and blocks, by kernels not yet run on a GPU.
        keep_dense: keep the dense weights too, so that `to_dense_runtime` restores the same parameter objects.
        tokens: token counts (batch size times sequence length) that "auto" times; None = some from 17 to 1024, and for
            a model that generates also from 1 to 8 (but for its encoder, which reads whole sequences). Other layers
            that are faster there are timed at 1 to 15 tokens too: where dense is as fast, the dense weight is kept
            and computes calls that are so short. With `tokens`, a call with fewer tokens than the smallest count may be
            slower than dense.
        table: where times are cached.

    Returns:
        The decision about each layer; `print` it.

    Raises:
        BackendError: if no layer has enough zeros, the model cannot be packed (still masked, quantized, not float32,
            packed already, all of it offloaded or on another device), "cpu" is requested and the kernels are missing,
            or "cpu-int8" and the processor has neither AVX2 nor the dot product of 64-bit ARM.

    Example:
        >>> import torch, hf_sparse
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
        >>> _ = hf_sparse.sparsify(model, hf_sparse.SparsityConfig(targets="*", sparsity=0.75))
        >>> hf_sparse.to_runtime(model, "csr").sparse[0].kernel
        'csr'
        >>> hf_sparse.to_dense_runtime(model)
    """
    check_model(model)
    status = library_status()
    _check_arguments(backend, tokens)
    if backend == "auto" and gpu.is_on_gpu(model):
        return _to_gpu_runtime(model, keep_dense, tokens, table or SpeedTable())
    decisions = survey(model)
    warn_of_others(model)
    refuse_dense(model, decisions)
    conversion = _Conversion(model, decisions, keep_dense)
    if backend == "dense":
        conversion.decisions = {
            name: decision if decision.reason else decision.stays_dense("backend 'dense' was requested")
            for name, decision in decisions.items()
        }
    else:
        timed = (table or SpeedTable()) if backend == "auto" else None
        try:
            kernel = KERNELS.fastest_exact() if backend == "auto" else KERNELS.backends[backend]
            conversion.pack(kernel, timed, tokens)
            if conversion.packed and kernel.isas and KERNELS[lm_head.KERNEL].unavailable() is None:
                conversion.read_lm_head(timed, tokens)
            if conversion.packed:
                fuse_all(model, conversion.packed, conversion.unfused)
        except BaseException:
            _restore(model)
            raise
    materialize(model.modules())
    return RuntimeReport(backend, machine(), status.message, conversion.reports())


@torch.inference_mode(False)
@torch.no_grad()
def to_dense_runtime(model: nn.Module) -> None:
    """Restore a model from its runtime form: plain `nn.Linear` with the weights it had, bit for bit, that can train.

    A model of which nothing is packed (`to_runtime` found dense faster everywhere) stays as it is.
    """
    check_model(model)
    if is_runtime(model):
        _restore(model)


def is_runtime(model: nn.Module) -> bool:
    """Return whether any layer of a model is packed for inference."""
    return any(isinstance(module, InRuntimeForm) for module in model.modules())


class _Conversion:
    """One call of `to_runtime`.

    Attributes:
        decisions: about each layer, by name.
        packed: the candidates that are packed.
    """

    def __init__(self, model: nn.Module, decisions: Mapping[str, LayerDecision], keep_dense: bool) -> None:
        self.model, self.keep_dense = model, keep_dense
        self.decisions = dict(decisions)
        self.shapes = {name: tuple(decision.layer.weight.shape) for name, decision in decisions.items()}
        self.dense_bytes = {name: decision.layer.weight.nbytes for name, decision in decisions.items()}
        self.packed: list[PackCandidate] = []
        self.errors: dict[str, RoundingErrors] = {}
        self.unfused = unfused_blocks(model)
        self.memory = HugePages()

    def pack(self, kernel: Kernel, table: SpeedTable | None, tokens: Sequence[int] | None) -> None:
        """Choose what is packed, and pack it."""
        for name, decision in self.decisions.items():
            if decision.reason is None and (why := kernel.refusal(decision.layer.weight.detach())):
                reason = f"the kernel '{kernel.name}' cannot take it: {why}"
                if table is None:  # requested by name
                    raise BackendError(f"layer '{name}' cannot be packed: {reason}")
                self.decisions[name] = decision.stays_dense(reason)
        able = {name: decision.layer for name, decision in self.decisions.items() if decision.reason is None}
        counts = token_counts(self.model, tokens)
        rival = KERNELS.for_few_tokens() if table is not None and generates(self.model) else None
        rivals = None if rival is None or rival is kernel else Candidates(self.model, able, rival.name)
        for group in Candidates(self.model, able, kernel.name).groups():
            at = counts(group.candidate)
            if table is not None and rivals is not None and min(at.needed) <= DECODING:
                choice = choose_for_decoding(group, rivals, self.decisions, table, at.needed)
            else:
                choice = choose(group, self.decisions, table, *at)
            self.decisions |= choice.decisions
            for candidate in choice.packed:
                if not kernel.exact:
                    self.errors |= candidate.errors()
                moved = candidate.moved(self.memory)
                moved.pack(moved.layers, self.keep_dense)
                self.packed.append(moved)
            trim_memory()

    def read_lm_head(self, table: SpeedTable | None, tokens: Sequence[int] | None) -> None:
        """Let the LM head compute with the GEMV kernel, where that is faster."""
        layer = lm_head.lm_head_of(self.model)
        name = next((name for name, decision in self.decisions.items() if decision.layer is layer), None)
        if layer is None or name is None or self.decisions[name].away:
            return
        materialize([layer])
        decision, speedups = self.decisions[name], self.decisions[name].speedups
        used = next((candidate.kernel for candidate in self.packed if KERNELS[candidate.kernel].few_tokens), None)
        few = None if used is None else lm_head.copy_of(layer, used)
        if table is not None:
            measured = lm_head.measure(layer, table, tokens or lm_head.TOKENS, few)
            speedups = {count: each.speedup for count, each in measured.items()}
            if not lm_head.is_faster(measured):
                self.decisions[name] = decision.stays_dense(decision.reason or "", speedups)
                return
        if few is not None and not KERNELS[few[0]].exact:
            self.errors[name] = lm_head.errors_of(layer, few)
        few = None if few is None else (few[0], self.memory.take(few[1]))
        lm_head.use_few_token_kernel(layer, few)
        self.decisions[name] = lm_head.decide(decision, speedups)

    def reports(self) -> tuple[LayerReport, ...]:
        """Return the report of each layer."""
        by_name = {name: candidate for candidate in self.packed for name in candidate.names}
        return tuple(self._report(name, decision, by_name.get(name)) for name, decision in self.decisions.items())

    def _report(self, name: str, decision: LayerDecision, candidate: PackCandidate | None) -> LayerReport:
        rows, limit, dense = 0, 0, self.dense_bytes[name]
        size = dense + lm_head.extra_bytes(decision.layer)
        if candidate is not None:
            packed = candidate.packed[candidate.names.index(name) if len(candidate.packed) > 1 else 0]
            # The bytes of layers that are packed as one are shared by their output rows.
            share = self.shapes[name][0] / packed.out_features
            rows, limit = packed.rows, candidate.dense_up_to
            size = round(packed.nbytes * share) + (dense if self.keep_dense or limit else 0)
        return LayerReport(
            *(name, self.shapes[name], decision.sparsity, decision.kernel, rows, size, dense),
            *(decision.speedups, decision.reason, *self.errors.get(name, (None, None)), limit),
        )


def unfused_blocks(model: nn.Module) -> list[SubBlock]:
    """Return the feed-forward sub-blocks that have to know if the layer whose weight they look at is packed."""
    blocks = [block for block in known_sub_blocks(model) if block.kind == "feed_forward"]
    return [block for block in blocks if fused_ffn.reads_output_weight(block)]


def fuse_all(model: nn.Module, packed: Sequence[PackCandidate], unfused: Sequence[SubBlock]) -> None:
    """Fuse what is packed, and protect the model.

    Args:
        unfused: of `unfused_blocks`, from before anything was packed.
    """
    for candidate in packed:
        candidate.fuse()
    for block in unfused:
        if isinstance(block.output, PackedLinear) and fused_ffn.is_fusible(block):
            fused_ffn.fuse(block, None)
    if any(KERNELS[candidate.kernel].few_tokens for candidate in packed):
        rms_norm.use_operator(model)
    freeze(model)
    guard(model)


def _restore(model: nn.Module) -> None:
    """Undo whatever of a conversion was done."""
    unguard(model)
    restore(model, RuntimeBlock)
    gpu.restore(model)
    done: set[int] = set()
    for module in list(model.modules()):
        if isinstance(module, PackedLinear) and id(module) not in done:
            together = module.joint.layers if module.joint is not None else (module,)
            become_dense(together)  # type: ignore[arg-type]
            done.update(map(id, together))
    unfreeze(model)


def _to_gpu_runtime(
    model: nn.Module, keep_dense: bool, tokens: Sequence[int] | None, table: SpeedTable
) -> RuntimeReport:
    decisions = survey(model, gpu=True)
    refuse_dense(model, decisions)
    try:
        reports = tuple(gpu.convert(model, decisions, keep_dense, tokens or gpu.TOKENS, table))
        if is_runtime(model):
            freeze(model)
            guard(model)
    except BaseException:
        _restore(model)
        raise
    kernels = ", ".join(kernel.name for kernel in KERNELS.of_device("cuda"))
    return RuntimeReport("auto", machine(), f"GPU kernels, not verified yet: {kernels}", reports)


def _check_arguments(backend: str, tokens: Sequence[int] | None) -> None:
    if backend not in backends():
        raise BackendError(f"`backend` must be one of {', '.join(map(repr, backends()))}, got {backend!r}")
    counts = tokens if isinstance(tokens, Sequence) else (None,)
    if tokens is not None and not (counts and all(isinstance(count, int) and count >= 1 for count in counts)):
        raise BackendError(f"`tokens` must be token counts >= 1, as in (1, 128), got {tokens!r}")
    kernel = KERNELS.backends.get(backend)
    if kernel is not None and (why := kernel.unavailable()) is not None:
        raise BackendError(
            f"backend {backend!r} was requested, and cannot run here: {why} (backend 'auto' takes the fastest exact "
            "kernel that can)"
        )
