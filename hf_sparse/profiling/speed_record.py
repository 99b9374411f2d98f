"""The measured speed of a model next to its dense baseline, and the setting of the measurement.

One format, which `hf-sparse bench` writes and cards, reports and comparisons read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..utils.validation import is_number

SPEED = "speed.json"
"""File next to a model with the result of `hf-sparse bench`."""

NOTHING = 1.03
"""Speed-ups below this are noise: runs of the same model differ by as much."""

Quartiles = tuple[float, float, float]
"""25 %, median, 75 %."""

FP32 = "float32"

MOST_ENGINES = 64

_TEXTS, _COUNTS = ("model", "against", "machine", "dtype"), ("threads", "batch", "length")


@dataclasses.dataclass(frozen=True)
class EngineSpeed:
    """Another engine that ran the dense baseline, beside torch.

    Attributes:
        name: of the engine.
        version: of its package.
        precision: "float32" or "int8".
        seconds: of a forward pass, or of those over all examples.
        speedup: its time over that of the sparse model, round by round.
        difference: of its outputs to those of torch, relative to the largest output.
    """

    name: str
    version: str
    precision: str
    seconds: Quartiles
    speedup: Quartiles
    difference: float

    @classmethod
    def from_dict(cls, data: Any) -> EngineSpeed:
        """Build from plain JSON types.

        Raises:
            CheckpointError: if a field is missing or not of its kind.
        """
        named = ("name", "version", "precision")
        if not isinstance(data, Mapping) or not all(isinstance(data.get(key), str) for key in named):
            raise CheckpointError(f"an engine of a measured speed must have {', '.join(named)}, got {data!r:.80}")
        if not is_number(data.get("difference")):
            raise CheckpointError(f"an engine of a measured speed must have a `difference`, got {data!r:.80}")
        return cls(
            **{key: data[key][:80] for key in named},
            seconds=_quartiles(data.get("seconds"), "engines.seconds"),
            speedup=_quartiles(data.get("speedup"), "engines.speedup"),
            difference=float(data["difference"]),
        )


def fastest(engines: Sequence[EngineSpeed], precision: str) -> EngineSpeed | None:
    """Return the engine with the lowest median time."""
    return min((e for e in engines if e.precision == precision), key=lambda e: e.seconds[1], default=None)


@dataclasses.dataclass(frozen=True)
class Speed:
    """A measured speed-up, with its setting.

    Args:
        model, against: what was measured, and its dense baseline.
        machine, threads, dtype, batch, length: setting of the measurement.
        dense, sparse: time of a forward pass, or of those over all examples.
        speedup: dense time over sparse time, round by round.
        dense_bytes, sparse_bytes: of parameters and buffers in memory.
        examples: which were measured, and how long they are; `length` is that of the longest. None = all of one length.
        engines: that ran the dense baseline beside torch; None = a file of before they were measured.

    Units: dense and sparse in seconds.
    """

    model: str
    against: str
    machine: str
    threads: int
    dtype: str
    batch: int
    length: int
    dense: Quartiles
    sparse: Quartiles
    speedup: Quartiles
    dense_bytes: int
    sparse_bytes: int
    examples: str | None = None
    engines: tuple[EngineSpeed, ...] | None = None

    @classmethod
    def from_dict(cls, data: Any) -> Speed:
        """Build from what `hf_sparse.analysis.benchmark.Comparison.to_dict` returns; other keys are ignored.

        Raises:
            CheckpointError: if a field is missing or not of its kind.
        """
        setting = _mapping(data, "setting")
        for key in _TEXTS:
            if not isinstance(setting.get(key), str):
                raise CheckpointError(
                    f"the setting of a measured speed must have a text `{key}`, got {setting.get(key)!r:.80}"
                )
        for key in _COUNTS:
            if type(setting.get(key)) is not int or setting[key] < 1:
                raise CheckpointError(
                    f"the setting of a measured speed must have `{key}` >= 1, got {setting.get(key)!r:.80}"
                )
        examples = setting.get("examples")
        if examples is not None and not isinstance(examples, str):
            raise CheckpointError(f"`examples` of a measured speed must be a text, got {examples!r:.80}")
        dense, runtime = _mapping(data, "dense"), _mapping(data, "runtime")
        for name, part in (("dense", dense), ("runtime", runtime)):
            if type(part.get("bytes")) is not int or part["bytes"] < 1:
                raise CheckpointError(
                    f"the measured speed must have `{name}.bytes` >= 1, got {part.get('bytes')!r:.80}"
                )
        return cls(
            **{key: setting[key] for key in (*_TEXTS, *_COUNTS)},
            dense=_quartiles(dense.get("seconds"), "dense.seconds"),
            sparse=_quartiles(runtime.get("seconds"), "runtime.seconds"),
            speedup=_quartiles(data.get("speedup"), "speedup"),
            dense_bytes=dense["bytes"],
            sparse_bytes=runtime["bytes"],
            examples=examples,
            engines=_engines(data.get("engines")),
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each row of a table."""
        return [
            ("dense", _milliseconds(self.dense)),
            ("this model", _milliseconds(self.sparse)),
            ("gain", verdict(self.speedup)),
            *self._engine_rows(),
            ("in memory", f"{self.sparse_bytes / 1e6:.1f} MB, dense {self.dense_bytes / 1e6:.1f} MB"),
            *((key, str(getattr(self, key))) for key in ("against", "machine", *_COUNTS, "dtype")),
            *([] if self.examples is None else [("examples", self.examples)]),
        ]

    def _engine_rows(self) -> list[tuple[str, str]]:
        """Return rows about the fastest dense engines, other than torch where one is faster."""
        rows = [("other dense engines", "none measured")] if self.engines == () else []
        for precision in dict.fromkeys(engine.precision for engine in self.engines or ()):
            best = fastest(self.engines or (), precision)
            assert best is not None
            if precision == FP32 and best.seconds[1] >= self.dense[1]:
                rows.append((f"fastest dense {FP32} engine", f"torch, before {best.version} ({best.name})"))
                continue
            rows.append(
                (f"fastest dense {precision} engine", f"{best.version} ({best.name}), {_milliseconds(best.seconds)}")
            )
            rows.append((f"gain over it, {precision}", verdict(best.speedup)))
        return rows


def _engines(data: Any) -> tuple[EngineSpeed, ...] | None:
    if data is None:
        return None
    if not isinstance(data, list | tuple) or len(data) > MOST_ENGINES:
        raise CheckpointError(f"`engines` of the measured speed must be a list, got {data!r:.80}")
    return tuple(map(EngineSpeed.from_dict, data))


def verdict(speedup: Sequence[float]) -> str:
    """Describe a speed-up in words.

    Example:
        >>> verdict((1.9, 2.0, 2.1))
        '2.00x as fast [1.90, 2.10]'
        >>> verdict((0.9, 1.0, 1.1))
        'no speed-up: 1.00x [0.90, 1.10]'
        >>> verdict((0.9, 1.5, 2.1))
        'no clear speed-up: 1.50x [0.90, 2.10]'
    """
    low, middle, high = speedup
    if middle >= NOTHING > low:
        result = f"no clear speed-up: {middle:.2f}x"
    else:
        result = f"no speed-up: {middle:.2f}x" if middle < NOTHING else f"{middle:.2f}x as fast"
    return f"{result} [{low:.2f}, {high:.2f}]"


def read_speed(path: str | os.PathLike[str]) -> Speed:
    """Read a file that `hf-sparse bench --json` or `--save` wrote.

    Raises:
        CheckpointError: if it is not such a file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the timings {os.fspath(path)}: {error}") from error
    try:
        return Speed.from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)} is not what `hf-sparse bench` writes: {error}") from error


def _mapping(data: Any, key: str) -> Mapping[str, Any]:
    value = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the measured speed must have a mapping `{key}`, got {value!r:.80}")
    return value


def _quartiles(value: Any, where: str) -> Quartiles:
    good = isinstance(value, (list, tuple)) and len(value) == 3 and all(is_number(v) for v in value)
    if not good or not all(v > 0 for v in value) or list(value) != sorted(value):
        raise CheckpointError(f"`{where}` of the measured speed must be quartiles, got {value!r:.80}")
    return value[0], value[1], value[2]


def _milliseconds(seconds: Quartiles) -> str:
    low, middle, high = (1e3 * value for value in seconds)
    return f"{middle:.2f} ms [{low:.2f}, {high:.2f}]"
