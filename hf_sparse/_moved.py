"""Old dotted paths: `import hf_sparse.adapters` gives the module that is now `hf_sparse.hf.peft`, with a warning.

Remove a line one release after the path it keeps was announced as deprecated in the CHANGELOG.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]
MOVED = dict(
    line.split()
    for line in """
    ablation analysis.ablation
    adapters hf.peft
    allocation analysis.allocation
    architectures modeling.architectures
    attaching pruning.mask_state_dict
    bench analysis.benchmark
    budget pruning.selection.budget
    callback hf.trainer.callback
    checkpoint hf.trainer.checkpoint
    cli_data cli.data_options
    codecs formats.codecs
    compaction pruning.compaction
    compare analysis.runs
    compressed_tensors formats.compressed_tensors
    convert hf.conversion.convert
    data recipe.data
    distillation_config config.distillation
    doctor analysis.environment
    drawing reporting.plotting
    edits formats.structure
    examples distillation.example_keys
    export hf.export.exporter
    export_inputs hf.export.inputs
    export_targets hf.export.backends
    files formats.safetensors_io
    filling pruning.fill
    fsdp hf.trainer.fsdp
    heads analysis.head_table
    hub hf.hub.push
    importance pruning.head_importance
    inspection formats.inspection
    kernels.block_sparse kernels.gpu.block_sparse
    kernels.block_sparse_triton kernels.gpu.block_sparse_triton
    kernels.checks kernels.validation
    kernels.dense kernels.dense_gemv
    kernels.fallback kernels.reference
    kernels.int8 kernels.int8_ops
    kernels.int8_blocks kernels.int8_ops
    kernels.int8_packing kernels.int8_layout
    kernels.ops kernels.fp32_ops
    kernels.packing kernels.fp32_layout
    kernels.semi_structured kernels.gpu.semi_structured
    kernels.semi_structured_layout kernels.gpu.semi_structured_layout
    kth pruning.selection.topk
    labelled recipe.data_loader
    latency profiling.latency_table
    learning hf.trainer.distillation_callback
    loading hf.auto
    loss_terms hf.trainer.loss_hook
    losses distillation.losses
    manifest formats.manifest
    markdown utils.markdown
    masking pruning.masked_weight
    measuring pruning.calibration
    metrics recipe.metrics
    model_card hf.hub.model_card
    oneshot pruning.oneshot
    optimizer hf.trainer.optimizer
    packing hf.quantization.saving
    page reporting.html
    pareto analysis.pareto
    patterns pruning.patterns
    patterns.lines pruning.patterns.row_column
    patterns.structures pruning.patterns.structured
    permutation pruning.nm_permutation
    placing reporting.label_placement
    plan pruning.group
    prune recipe.prune
    pruner pruning.pruner
    quantizer hf.quantization.quantizer
    radix pruning.selection.topk_radix
    ranks pruning.mask_sync
    recipe_sections recipe.sections
    recipe_text utils.strict_yaml
    report pruning.summary
    report_page analysis.model_report
    requantize hf.quantization.bnb
    results analysis.results
    run recipe.train
    runtime.after runtime.residual_norm
    runtime.attention runtime.fused_attention
    runtime.blocks runtime.fused_ffn
    runtime.choosing runtime.planner
    runtime.csr kernels.csr_op
    runtime.layers runtime.packed_linear
    runtime.packed runtime.packed_weight
    runtime.timing runtime.autotune
    runtime.vocabulary runtime.lm_head
    runtime.waiting runtime.lazy_weights
    schedules pruning.schedules
    scorers pruning.scorers
    scorers.regrow pruning.scorers.dynamic
    selection pruning.selection
    sensitivity analysis.sensitivity
    shards formats.sharding
    sparse_config hf.quantization.config
    speed profiling.speed_record
    stages recipe.stages
    stress analysis.robustness
    targets modeling.layer_matching
    teach recipe.cache_teacher
    teacher hf.trainer.teacher
    teacher_cache hf.trainer.teacher_cache
    text_metrics recipe.metrics
    units pruning.unit
    warmup pruning.score_warmup
    zeros modeling.zero_preservation
    """.strip().splitlines()
)
"""Old path to new path, both below the package."""


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import the new module where the old path is requested."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return None if new_path(fullname) is None else importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = new_path(spec.name)
        assert new is not None
        module = importlib.import_module(new)
        message = f"{spec.name} has moved to {new}; the old path will be removed in the next release"
        warnings.warn(message, FutureWarning, stacklevel=2)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import system replaced; it ran under its new name."""
        module.__spec__ = self._specs.pop(module.__name__)


def new_path(fullname: str) -> str | None:
    """Return where a module lies now, or None if it has not moved.

    >>> new_path("hf_sparse.adapters")
    'hf_sparse.hf.peft'
    >>> new_path("hf_sparse.codecs.bitmask")
    'hf_sparse.formats.codecs.bitmask'
    """
    package, _, path = fullname.partition(".")
    if package != _PACKAGE:
        return None
    known, rest = path, ""
    while known and known not in MOVED:
        known, _, last = known.rpartition(".")
        rest = f".{last}{rest}"
    return f"{_PACKAGE}.{MOVED[known]}{rest}" if known else None


def install() -> None:
    """Ask this finder first, once: the path of a moved package would find a second copy of its modules."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedFinder())
