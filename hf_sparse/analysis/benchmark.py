"""Is the runtime form of a model faster than the dense one? Outputs first, then interleaved times, then memory."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .._version import __version__
from ..errors import BackendError, RecipeError
from ..hf.auto import load_whole
from ..kernels import KERNELS
from ..profiling.machine import machine
from ..profiling.speed_record import FP32, EngineSpeed, fastest, verdict
from ..profiling.timer import interleave, quartiles, ratios, threads_of_torch
from ..pruning.compaction import edits_of
from ..runtime import RuntimeReport, to_runtime
from ..runtime.memory import bytes_of
from .bench_inputs import Examples, inputs_of, make_inputs
from .dense_engines import ENGINES, Engine, Job, built, first_output

TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output, that counts as rounding."""

INT8_TOLERANCE = 0.25
"""The same for int8: rounding to 8 bits in a model of some layers differs by less."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time and memory of one model.

    Attributes:
        seconds: quartiles of the time of a forward pass, or of those over all examples: 25 %, median, 75 %.
        bytes: of its weights in memory, see `bytes_of`.
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
        engines: other engines that ran the dense baseline.
        left_out: engines that could not, and why.
    """

    setting: dict[str, Any]
    difference: float
    dense: Timing
    runtime: Timing
    speedup: tuple[float, float, float]
    report: RuntimeReport
    engines: tuple[EngineSpeed, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
        lines.append(f"outputs differ by {self.difference:.1e} of the largest from those of the same weights dense")
        for name, timing in (("dense", self.dense), ("runtime", self.runtime)):
            low, middle, high = (1e3 * value for value in timing.seconds)
            lines.append(f"{name:<8} {middle:9.2f} ms [{low:.2f}, {high:.2f}]  {timing.bytes / 1e6:9.1f} MB")
        if "examples" in self.setting:
            rates = (self.setting["count"] / each.seconds[1] for each in (self.dense, self.runtime))
            lines.append("examples a second: dense {:.1f}, runtime {:.1f}".format(*rates))
        lines.append(f"{self.verdict}; medians and quartiles, interleaved")
        for engine in self.engines:
            low, middle, high = (1e3 * value for value in engine.seconds)
            lines.append(f"{engine.name:<16} {middle:9.2f} ms [{low:.2f}, {high:.2f}]  dense, {engine.version}")
        precisions = dict.fromkeys(engine.precision for engine in self.engines)
        lines += map(self._over_fastest, precisions)
        lines += [f"{name:<16} left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    def _over_fastest(self, precision: str) -> str:
        best = fastest(self.engines, precision)
        assert best is not None
        if precision == FP32 and best.seconds[1] >= self.dense.seconds[1]:
            return f"fastest dense {precision} engine: torch, as above"
        return f"fastest dense {precision} engine: {best.name}; over it, {verdict(best.speedup)}"


def bench(
    model: str,
    against: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    length: int | None = None,
    backend: str = "auto",
    rounds: int = 15,
    revision: str = "main",
    examples: Examples | None = None,
    engines: Sequence[str] = (),
) -> Comparison:
    """Compare a saved sparse model in runtime form with a dense one.

    Args:
        model: folder or Hub name.
        against: the dense model; None = the same weights dense.
        threads: of torch; None = the current number.
        batch: examples in a batch.
        length: tokens of each example, or the most that is kept of a text; None = what the model takes, at most 128
            tokens, or 512 of a text.
        backend: see `to_runtime`.
        rounds: passes of each model, interleaved.
        revision: branch, tag or commit on the Hub.
        examples: that are timed, sorted by length in padded batches; None = random tokens.
        engines: names of `dense_engines.ENGINES`: what else runs the dense model, in the same rounds and as many
            threads. Where another engine is faster than torch, that is the fair baseline.

    Raises:
        BackendError: if the outputs are not those of the same weights dense, or the runtime refuses the model.
        RecipeError: if a model cannot be loaded, or a number is below 1.
    """
    counts = {"threads": threads, "batch": batch, "length": length, "rounds": rounds}
    for name, value in (counts | ({} if examples is None else {"samples": examples.samples})).items():
        if value is not None and value < 1:
            raise RecipeError(f"`{name}` must be at least 1, got {value}")
    sparse = load_whole(model, revision, dtype=torch.float32)
    dense = load_whole(model, revision, dtype=torch.float32)
    with threads_of_torch(threads):
        inputs = inputs_of(sparse, batch, length, examples, model, revision)
        report = _in_runtime_form(sparse, backend)
        rounds_weights = backend in KERNELS.backends and not KERNELS.backends[backend].exact
        tolerance = INT8_TOLERANCE if rounds_weights else TOLERANCE
        difference = max(compare(sparse, dense, each, tolerance) for each in inputs.batches)
        if against is not None:
            dense = load_whole(against, dtype=torch.float32)
            _check_same_inputs(sparse, dense)
        seconds, others, left_out = _timed(dense, sparse, inputs.batches, engines, rounds)
        setting = {
            "model": _public_name(model),
            "against": "the same weights, dense" if against is None else _public_name(against),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "versions": f"hf_sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
            "dtype": "float32",
            "batch": batch,
            "length": inputs.length,
            **({} if inputs.examples is None else {"examples": inputs.examples, "count": inputs.count}),
            "layers sparse": f"{len(report.sparse)} of {len(report.layers)}",
        }
    return Comparison(
        setting,
        difference,
        Timing(quartiles(seconds["dense"]), bytes_of(dense)),
        Timing(quartiles(seconds["runtime"]), bytes_of(sparse)),
        quartiles(ratios(seconds, "dense", "runtime")),
        report,
        others,
        left_out,
    )


def _timed(
    dense: Any, sparse: Any, batches: Sequence[dict[str, Tensor]], engines: Sequence[str], rounds: int
) -> tuple[dict[str, list[float]], tuple[EngineSpeed, ...], dict[str, str]]:
    """Return the times of each round by name, what is to be said of other engines, and which are left out."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        lengths = len({each["input_ids"].shape for each in batches})
        job = Job(dense, lengths, torch.get_num_threads(), Path(folder))
        others, left_out = built(engines, job, partial(engine_difference, dense, batches))
        seconds = interleave(
            {
                "dense": lambda: [dense(**each) for each in batches],
                "runtime": lambda: [sparse(**each) for each in batches],
                **{name: partial(_over_all, run, batches) for name, (run, _) in others.items()},
            },
            rounds,
        )
    said = [
        EngineSpeed(
            *(name, ENGINES[name].version, ENGINES[name].precision, quartiles(seconds[name])),
            *(quartiles(ratios(seconds, name, "runtime")), apart),
        )
        for name, (_, apart) in others.items()
    ]
    return seconds, tuple(said), left_out


def _over_all(run: Engine, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    return [run(each) for each in batches]


@torch.inference_mode()
def engine_difference(
    dense: nn.Module, batches: Sequence[Mapping[str, Tensor]], precision: str, engine: Engine
) -> float:
    """Return the largest difference of the outputs of an engine from those of the dense model, see `compare`.

    Raises:
        BackendError: if it is above what the precision explains.
    """
    tolerance = TOLERANCE if precision == FP32 else INT8_TOLERANCE
    return max(_within(engine(each), first_output(dense(**each)), tolerance, "this engine") for each in batches)


@torch.inference_mode()
def compare(model: nn.Module, dense: nn.Module, inputs: dict[str, Tensor], tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of the outputs, relative to the largest output.

    Raises:
        BackendError: if that is above the tolerance, by default that of rounding.
    """
    outputs, expected = first_output(model(**inputs)), first_output(dense(**inputs))
    return _within(outputs, expected, tolerance, "the runtime form")


def _within(outputs: Tensor, expected: Tensor, tolerance: float, whose: str) -> float:
    if outputs.shape != expected.shape:
        raise BackendError(f"the outputs of {whose} have shape {tuple(outputs.shape)}, not {tuple(expected.shape)}")
    difference = float((outputs - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= tolerance:
        raise BackendError(
            f"the outputs of {whose} differ from those of the same weights dense by {difference:.1e} of the "
            f"largest output, which is above the tolerance of {tolerance:.0e}, so nothing is timed. Check the kernels "
            "with `hf-sparse doctor`"
        )
    return difference


@torch.inference_mode()
def _check_same_inputs(model: nn.Module, against: nn.Module) -> None:
    """Raise unless two models take the same inputs, and return outputs of one shape."""
    ours, theirs = (make_inputs(each, 1, 1) for each in (model, against))
    configs: list[Any] = [each.config for each in (model, against)]
    sizes = [int(config.vocab_size) for config in configs]
    same = ours.keys() == theirs.keys() and sizes[1] >= sizes[0]
    if not same or first_output(model(**ours)).shape[1:] != first_output(against(**theirs)).shape[1:]:
        raise RecipeError(
            f"a {type(model).__name__} with {sizes[0]:,} tokens in its vocabulary cannot be compared with a "
            f"{type(against).__name__} with {sizes[1]:,}: both get the same inputs, and outputs must be of one shape. "
            "Name its dense baseline"
        )


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
