"""Export: a saved model as a file for another runtime, checked against the model before it is written.

The tracing is that of `transformers.exporters`. What is added here: inputs and dynamic sizes that fit the model, the
check, files without the paths and configs of the machine that made them, and a report that says what zeros are worth.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, exporters
from transformers.exporters import ExportedModel

from ...errors import BackendError, RecipeError
from ...pruning.masked_weight import masks_on
from ...utils.text import format_bytes
from ..auto import load_tokenizer, load_whole
from .backends import TARGETS, Target, require
from .inputs import Sizes, dynamic_sizes, sample, sizes_for

logger = logging.getLogger(__name__)


TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, as a fraction of the largest output (at least of 1); 1e-4 for other types."""

ZEROS_WORTH_A_WORD = 0.01
"""Below this fraction of zeros the report does not mention them: the row of a padding token is one."""


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how well it agrees. `print` it for the text.

    Args:
        to: the runtime.
        output: the folder.
        files: bytes of each file of the program, without configs and tokenizer.
        difference: largest absolute difference between an output of the program and of the model; where there are
            several outputs, that of the one which is nearest to its limit.
        allowed: how much would have been allowed for that output.
        batches: the batches compared, as (rows, length).
        parameters: of the model.
        sparsity: fraction of zeros in its matrices.
        dense_bytes: what they take dense, in their own types.
        bounds: the largest batch and length that will run, where they are fixed.
    """

    to: str
    output: Path
    files: dict[str, int]
    difference: float
    allowed: float
    batches: tuple[tuple[int, int], ...]
    parameters: int
    sparsity: float
    dense_bytes: int
    bounds: tuple[int, int] | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes of the program: graph and weights."""
        return sum(self.files.values())

    def __str__(self) -> str:
        batches = ", ".join(f"{rows}x{length}" for rows, length in self.batches)
        lines = [
            f"Exported to {self.to} in {self.output}: {', '.join(self.files)}",
            f"largest difference to the model: {self.difference:.1e} (allowed {self.allowed:.1e}), batches {batches}",
            f"size: {format_bytes(self.file_bytes)}; the {self.parameters:,} parameters dense: "
            f"{format_bytes(self.dense_bytes)}",
        ]
        if note := TARGETS[self.to].note:
            lines.append(note)
        if self.bounds is not None:
            lines.append("runs batches of up to {} rows and {} tokens (--batch, --length)".format(*self.bounds))
        if self.sparsity > ZEROS_WORTH_A_WORD:
            lines.append(
                f"{self.sparsity:.1%} of the entries of matrices are zero, and stored: unstructured zeros do not make "
                "this file smaller; remove heads/neurons with hf-sparse compact first"
            )
        return "\n".join(lines)


def export(
    name: str,
    to: str,
    output: str | os.PathLike[str] | None = None,
    *,
    revision: str = "main",
    dtype: str | None = None,
    **options: Any,
) -> ExportReport:
    """Load a saved model whole, export it, and copy its tokenizer.

    Args:
        name: folder or Hub name.
        to: the runtime: onnx, openvino, executorch or torch.
        output: folder that is written; by default the folder `to` inside that of the model.
        revision: branch, tag or commit on the Hub.
        dtype: type of the weights, as "float32"; None = as they were saved.
        **options: as of `export_model`.

    Raises:
        BackendError: as `export_model`.
        RecipeError: as `export_model`, and if the model cannot be loaded, or would be overwritten.
    """
    require(to)
    source = Path(name)
    folder = Path(output) if output is not None else source / to if source.is_dir() else Path(f"{source.name}-{to}")
    if folder.resolve() == source.resolve():
        raise RecipeError(f"--output {folder} is the folder of the model, whose config would be lost; choose another")
    model = load_whole(name, revision, **({} if dtype is None else {"dtype": dtype}))
    report = export_model(model, to, folder, **options)
    try:
        load_tokenizer(name, revision).save_pretrained(folder)
    except RecipeError as error:
        logger.warning("no tokenizer was copied: %s", error)
    return report


def export_model(
    model: PreTrainedModel,
    to: str,
    output: str | os.PathLike[str],
    *,
    batch: int = 2,
    length: int | None = None,
    opset: int | None = None,
) -> ExportReport:
    """Export a model with dynamic batch and length, after comparing the program's outputs with the model's.

    An encoder-decoder becomes one graph without a cache: the growing `decoder_input_ids` are fed whole.

    Args:
        model: with weights as they are to stay; it is left as it was.
        to: the runtime: onnx, openvino, executorch or torch.
        output: folder that is written: the program, `export.json` and `config.json`.
        batch: rows of the sample; where the runtime plans its memory (ExecuTorch), the most that will run.
        length: tokens of the sample, and the same; None = 128, or what the model can take.
        opset: version of the ONNX operators.

    Raises:
        BackendError: if a package is missing, the model cannot be traced, the exporter writes another opset than the
            requested one, or the outputs differ. Nothing is written.
        RecipeError: if the target is unknown, the model takes no text, is still masked, or a size does not fit.
    """
    target = require(to)
    if opset is not None and to != "onnx":
        raise RecipeError(f"opset is for onnx, but the export is to {to}")
    if masked := [path for path, module in model.named_modules() if masks_on(module)]:
        raise RecipeError(f"'{masked[0]}' is still being pruned: bake the model first (Pruner.bake), or save and load")
    sizes = sizes_for(model, batch, length)
    settings = {} if opset is None else {"opset_version": opset}
    with _still(model), _quiet():
        inputs = sample(model, sizes)
        shapes = dynamic_sizes(inputs, sizes if target.bounded else None)
        config = getattr(exporters, target.config)(dynamic=True, dynamic_shapes=shapes, **settings)
        try:
            exported = getattr(exporters, target.exporter)().export(model, dict(inputs), config)
            _strip(exported, to)
            _check_opset(exported, opset)
            exported.to(**target.runner)
            compared = sizes.compared(bounded=target.bounded)
            difference, allowed = compare_outputs(model, exported, compared)
        except BackendError:
            raise
        except Exception as error:
            hint = "" if model.dtype == torch.float32 else f". Its weights are {model.dtype}; try dtype float32"
            reason = f"{type(error).__name__}: {_first_line(error)}{hint}"
            raise BackendError(f"{type(model).__name__} cannot be exported to {to}: {reason}") from error
        exported.config = _plain_config(model)
        exported.generation_config = model.generation_config if model.can_generate() else None
        exported.save_pretrained(output)
    files = _program_files(target, exported, Path(output))
    parameters = list(model.parameters())
    return ExportReport(
        to=to,
        output=Path(output),
        files=files,
        difference=difference,
        allowed=allowed,
        batches=tuple((each.batch, each.length) for each in compared),
        parameters=sum(parameter.numel() for parameter in parameters),
        sparsity=_sparsity(parameters),
        dense_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        bounds=(sizes.batch, sizes.length) if target.bounded else None,
    )


def compare_outputs(model: PreTrainedModel, exported: Any, compared: list[Sizes]) -> tuple[float, float]:
    """Compare the outputs of a model with those of its export.

    Args:
        exported: callable with the model's inputs; returns its outputs by name.
        compared: batch sizes and sequence lengths.

    Returns:
        The largest difference relative to its tolerance, and that tolerance.

    Raises:
        BackendError: for an output of another shape, or above its tolerance.
    """
    tolerance = TOLERANCES.get(model.dtype, 1e-4)
    largest, allowed = 0.0, tolerance
    for sizes in compared:
        inputs = sample(model, sizes)
        with torch.no_grad():
            wanted = model(**inputs)
        got = exported(**inputs)
        for key, want in wanted.items():
            if not isinstance(want, torch.Tensor):
                continue
            limit = tolerance * max(1.0, float(want.abs().max()))
            found = got.get(key)
            if found is None or found.shape != want.shape:
                shape = None if found is None else tuple(found.shape)
                raise BackendError(f"output '{key}' has shape {shape} exported, but {tuple(want.shape)} in the model")
            difference = float((found.float() - want.float()).abs().max())
            if not difference <= limit:  # NaN does not agree either
                raise BackendError(
                    f"output '{key}' differs from the model's by {difference:.1e}, {limit:.1e} is allowed (batch of "
                    f"{sizes.batch} rows, {sizes.length} tokens). Nothing was written"
                )
            if difference * allowed >= largest * limit:  # the one closest to its tolerance
                largest, allowed = difference, limit
    return largest, allowed


def _check_opset(exported: ExportedModel, opset: int | None) -> None:
    """Raise `BackendError` if the graph is not in the requested opset: torch's exporter prints why, and goes on."""
    for component in exported.components.values() if opset is not None else ():
        written = component.program.opset_imports.get("")
        if written != opset:
            raise BackendError(
                f"opset {opset} was requested, but torch {torch.__version__} can export this model to opset {written} "
                f"only. Nothing was written: request {written}, or leave the opset out"
            )


def _strip(exported: ExportedModel, to: str) -> None:
    """Drop the stack trace of every node: it names folders of this machine, and is most of a small model's graph."""
    for component in exported.components.values():
        if to == "onnx":
            for graph in (component.program.graph, *component.program.functions.values()):
                for node in graph.all_nodes():
                    node.metadata_props.clear()
        elif to == "torch":
            for node in component.program.graph.nodes:
                node.meta.pop("stack_trace", None)


def _plain_config(model: PreTrainedModel) -> Any:
    """Return the config without our manifest, which describes the weights of another file."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _sparsity(parameters: list[nn.Parameter]) -> float:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    entries = sum(matrix.numel() for matrix in matrices)
    return 1.0 - sum(int(torch.count_nonzero(matrix)) for matrix in matrices) / entries if entries else 0.0


def _program_files(target: Target, exported: ExportedModel, output: Path) -> dict[str, int]:
    exporter = getattr(exporters, target.exporter)
    names = [
        file
        for component in exported.components
        for file in exporter.program_files(f"{exporter.program_prefix}{component}{exporter.program_suffix}")
    ]
    return {name: (output / name).stat().st_size for name in names if (output / name).is_file()}


@contextlib.contextmanager
def _still(model: PreTrainedModel) -> Iterator[None]:
    """Let the model do nothing but compute: no dropout, no gradients (their hooks cannot be traced), no cache."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    configs = {id(config): config for module in model.modules() if (config := _config(module)) is not None}
    caching = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    model.eval().requires_grad_(False)
    for config, _ in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in trained:
            parameter.requires_grad_(True)
        for config, was in caching:
            config.use_cache = was


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporters print and warn of: it concerns their own code, and errors still come through."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
