"""Is the runtime form of a model faster than the dense one? Outputs first, then interleaved times, then memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .._version import __version__
from ..errors import BackendError, RecipeError
from ..hf.auto import load_whole, most_tokens
from ..profiling.machine import machine
from ..profiling.speed_record import verdict
from ..profiling.timer import interleave, quartiles, ratios, threads_of_torch
from ..pruning.compaction import edits_of
from ..runtime import RuntimeReport, to_runtime

TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output, that counts as rounding."""

LENGTH = 128
"""Tokens of each example, where nothing else is requested."""

INT8_TOLERANCE = 0.25
"""The same for int8: rounding to 8 bits in a model of some layers differs by less."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time and memory of one model.

    Attributes:
        seconds: quartiles of the time of a forward pass: 25 %, median, 75 %.
        bytes: of its parameters and buffers.
    """

    seconds: tuple[float, float, float]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model in runtime form compared with a dense one. `print` it.

    Attributes:
        setting: machine, versions, dtype, shapes.
        difference: of the outputs to those of the same weights dense, relative to the largest output.
        dense: the dense baseline.
        runtime: the model in runtime form.
        speedup: quartiles of dense time over runtime time, round by round.
        report: of `to_runtime`.
    """

    setting: dict[str, Any]
    difference: float
    dense: Timing
    runtime: Timing
    speedup: tuple[float, float, float]
    report: RuntimeReport

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, as `hf_sparse.profiling.speed_record.Speed` reads them."""
        return dataclasses.asdict(dataclasses.replace(self, report=None)) | {  # type: ignore[arg-type]
            "report": self.report.to_dict(),
            "verdict": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """The speed-up in words."""
        return verdict(self.speedup)

    def __str__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.setting.items()]
        lines.append(f"outputs differ by {self.difference:.1e} of the largest")
        for name, timing in (("dense", self.dense), ("runtime", self.runtime)):
            low, middle, high = (1e3 * value for value in timing.seconds)
            lines.append(f"{name:<8} {middle:9.2f} ms [{low:.2f}, {high:.2f}]  {timing.bytes / 1e6:9.1f} MB")
        lines.append(f"{self.verdict}; medians and quartiles, interleaved")
        return "\n".join(lines)


def bench(
    model: str,
    against: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    length: int | None = None,
    backend: str = "auto",
    rounds: int = 15,
    revision: str = "main",
) -> Comparison:
    """Compare a saved sparse model in runtime form with a dense one.

    Args:
        model: folder or Hub name.
        against: the dense model; None = the same weights dense.
        threads: of torch; None = the current number.
        batch: examples in a batch.
        length: tokens of each example; None = 128, or what the model takes where that is less.
        backend: see `to_runtime`.
        rounds: passes of each model, interleaved.

    Raises:
        BackendError: if the outputs are not those of the same weights dense, or the runtime refuses the model.
        RecipeError: if a model cannot be loaded, or a number is below 1.
    """
    for name, value in (("threads", threads), ("batch", batch), ("length", length), ("rounds", rounds)):
        if value is not None and value < 1:
            raise RecipeError(f"`{name}` must be at least 1, got {value}")
    sparse: nn.Module = load_whole(model, revision, dtype=torch.float32)
    dense: nn.Module = load_whole(model, revision, dtype=torch.float32)
    length = min(LENGTH, most_tokens(sparse) or LENGTH) if length is None else length
    with threads_of_torch(threads):
        inputs = make_inputs(sparse, batch, length)
        report = _in_runtime_form(sparse, backend)
        difference = compare(sparse, dense, inputs, INT8_TOLERANCE if backend == "cpu-int8" else TOLERANCE)
        if against is not None:
            dense = load_whole(against, dtype=torch.float32)
            _check_same_inputs(sparse, dense, batch, length)
        seconds = interleave({"dense": lambda: dense(**inputs), "runtime": lambda: sparse(**inputs)}, rounds)
        setting = {
            "model": _public_name(model),
            "against": "the same weights, dense" if against is None else _public_name(against),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "versions": f"hf_sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
            "dtype": "float32",
            "batch": batch,
            "length": length,
            "layers sparse": f"{len(report.sparse)} of {len(report.layers)}",
        }
    return Comparison(
        setting,
        difference,
        Timing(quartiles(seconds["dense"]), size(dense)),
        Timing(quartiles(seconds["runtime"]), size(sparse)),
        quartiles(ratios(seconds, "dense", "runtime")),
        report,
    )


@torch.inference_mode()
def compare(model: nn.Module, dense: nn.Module, inputs: dict[str, Tensor], tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of the outputs, relative to the largest output.

    Raises:
        BackendError: if that is above the tolerance, by default that of rounding.
    """
    outputs, expected = _first(model(**inputs)), _first(dense(**inputs))
    difference = float((outputs - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:
        raise BackendError(
            f"the outputs of the runtime form differ from those of the same weights dense by {difference:.1e} of the "
            f"largest output, which is above the tolerance of {tolerance:.0e}, so nothing is timed. Check the kernels "
            "with `hf-sparse doctor`"
        )
    return difference


def size(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model."""
    return sum(own.nbytes for own in (*model.parameters(), *model.buffers()))


def make_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Return random tokens; those of the decoder too, where there is one."""
    config: Any = model.config
    longest = most_tokens(model)
    if longest is not None and length > longest:
        raise RecipeError(f"`length` must be at most the {longest} positions of the model, got {length}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    if config.is_encoder_decoder and isinstance(end := config.eos_token_id, int):
        ids = torch.where(ids == end, (end + 1) % config.vocab_size, ids)
        ids[:, -1] = end  # a classifier reads its prediction at the one end token of each example
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _check_same_inputs(model: nn.Module, against: nn.Module, batch: int, length: int) -> None:
    """Raise unless two models take the same inputs."""
    ours, theirs = (make_inputs(each, batch, length) for each in (model, against))
    configs: list[Any] = [each.config for each in (model, against)]
    sizes = [int(config.vocab_size) for config in configs]
    if ours.keys() != theirs.keys() or sizes[1] < sizes[0]:
        raise RecipeError(
            f"a {type(model).__name__} with {sizes[0]:,} tokens in its vocabulary cannot be compared with a "
            f"{type(against).__name__} with {sizes[1]:,}: both get the same inputs. Name its dense baseline"
        )


def _first(outputs: Any) -> Tensor:
    first: Tensor = outputs[0] if not hasattr(outputs, "logits") else outputs.logits
    return first


def _in_runtime_form(model: nn.Module, backend: str) -> RuntimeReport:
    try:
        return to_runtime(model, backend)
    except BackendError:
        if not edits_of(model):
            raise
        # It is smaller, and so faster, without any sparse layer.
        return RuntimeReport(
            backend, machine(), "not used: the pruned heads or neurons are removed, and no layer is sparse", ()
        )


def _public_name(name: str) -> str:
    """Return a name without the path of a folder, which would tell about a machine."""
    return Path(name).resolve().name if Path(name).is_dir() else name
