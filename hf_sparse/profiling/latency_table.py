"""How long a sub-block takes on this machine, by how many of its heads or neurons are left. Measured once, then kept.

A table of timed shapes says more about speed than counting operations does: a layer with a tenth of its neurons is not
ten times faster. (ZipLM and the retraining-free pruning of Kwon et al. spend their budgets by such tables.)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SparsityError
from ..utils.atomic_io import write_text

CACHE_VARIABLE = "HF_SPARSE_CACHE"
_ROUNDS = 9
_LEVELS = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """A sub-block, as far as its time depends on it.

    Args:
        kind: "attention" or "feed_forward".
        width: features that go in and come out.
        groups: heads or neurons that it has.
        size: rows of each group in every input layer.
        inputs: number of input layers: 3 of an attention, 1 or 2 of a feed-forward part.
        length: tokens in a text.
        batch: texts at once.
    """

    kind: Literal["attention", "feed_forward"]
    width: int
    groups: int
    size: int
    inputs: int
    length: int
    batch: int

    @property
    def levels(self) -> list[int]:
        """Numbers of groups that are timed, from none to all."""
        steps = min(self.groups, _LEVELS)
        return sorted({round(self.groups * step / steps) for step in range(steps + 1)})


Clock = Callable[[Shape, int], float]
"""Shape and number of groups left -> seconds."""


@torch.no_grad()
def measure(shape: Shape, groups: int) -> float:
    """Time a sub-block with this many groups left, on the CPU with torch's threads.

    Units: seconds, the median of several runs.
    """
    if groups == 0:
        return 0.0
    x = torch.randn(shape.batch, shape.length, shape.width)
    inner = groups * shape.size
    inputs = [torch.randn(inner, shape.width) for _ in range(shape.inputs)]
    output = torch.randn(shape.width, inner)
    run = _attention if shape.kind == "attention" else _feed_forward
    seconds = []
    for _ in range(_ROUNDS + 2):
        start = time.perf_counter()
        run(shape, groups, x, inputs, output)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first two warm up


def _attention(shape: Shape, groups: int, x: Tensor, inputs: list[Tensor], output: Tensor) -> Tensor:
    heads = (shape.batch, shape.length, groups, shape.size)
    q, k, v = (F.linear(x, weight).view(heads).transpose(1, 2) for weight in inputs)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape.batch, shape.length, -1)
    return F.linear(mixed, output)


def _feed_forward(shape: Shape, groups: int, x: Tensor, inputs: list[Tensor], output: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, inputs[0]))
    for gate in inputs[1:]:
        hidden = hidden * F.linear(x, gate)
    return F.linear(hidden, output)


def machine() -> str:
    """Return what times depend on beside the shape: processor, threads, torch.

    Example:
        >>> "threads" in machine()
        True
    """
    cpu = Path("/proc/cpuinfo")
    found = processor_of(cpu.read_text(encoding="utf-8", errors="replace")) if cpu.is_file() else ""
    processor = found or platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor_of(cpuinfo: str) -> str:
    """Return the name in the text of /proc/cpuinfo, with family and model: that of a virtual machine may lack them.

    Example:
        >>> import os
        >>> processor_of(os.linesep.join(["cpu family : 26", "model : 2", "model name : AMD EPYC"]))
        'AMD EPYC (family 26, model 2)'
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())  # those of the first processor
    name, numbers = fields.get("model name", ""), [fields.get(key, "") for key in ("cpu family", "model")]
    return f"{name} (family {numbers[0]}, model {numbers[1]})" if name and all(numbers) else name


def cache_folder() -> Path:
    """Return the folder that HF_SPARSE_CACHE names, or ~/.cache/hf_sparse."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "hf_sparse")


class TimesFile:
    """Measured times by what was measured, in a JSON file that several processes may write.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, list[float]]:
        """Return what is known; a file that cannot be read knows nothing."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}  # a cache: what cannot be read is measured again
        if not isinstance(found, dict):
            return {}
        return {key: times for key, times in found.items() if _are_times(times)}

    def write(self, table: dict[str, list[float]]) -> None:
        """Replace the file.

        Raises:
            SparsityError: if it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(table, indent=1))
        except OSError as error:
            raise SparsityError(
                f"cannot keep the measured times in {self.path}: {error}. Name a folder that can be written: "
                f"{CACHE_VARIABLE}=/some/folder"
            ) from error


class LatencyTable:
    """Times of shapes on this machine, kept in a file between runs.

    Args:
        path: of the file; None = `latency.json` in the folder that HF_SPARSE_CACHE names, or in ~/.cache/hf_sparse.
        clock: what measures.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, clock: Clock = measure) -> None:
        self.file = TimesFile(Path(path) if path is not None else cache_folder() / "latency.json")
        self.path = self.file.path
        self.clock = clock

    def times(self, shape: Shape) -> Tensor:
        """Return the seconds for each number of groups from 0 to all, measured at some and linear between them.

        Shapes: `(groups + 1,)`, float64, never falling.
        """
        known = self.file.read()
        key = f"{machine()}; {dataclasses.astuple(shape)}"
        levels = shape.levels
        measured = known.get(key)
        if measured is None or len(measured) != len(levels):
            measured = [self.clock(shape, level) for level in levels]
            self.file.write({**self.file.read(), key: measured})
        return _between(levels, measured)


def _are_times(value: object) -> bool:
    return isinstance(value, list) and all(type(time) in (int, float) and 0.0 <= time < 1e6 for time in value)


def _between(levels: list[int], measured: list[float]) -> Tensor:
    """Fill in what was not measured. Noise is not allowed to make fewer groups slower than more.

    Example:
        >>> _between([0, 2, 4], [0.0, 3.0, 2.0]).tolist()
        [0.0, 1.5, 3.0, 3.0, 3.0]
    """
    rising = torch.tensor(measured, dtype=torch.float64).cummax(0).values
    out = torch.empty(levels[-1] + 1, dtype=torch.float64)
    for (low, a), (high, b) in itertools.pairwise(zip(levels, rising.tolist(), strict=True)):
        out[low : high + 1] = torch.linspace(a, b, high - low + 1, dtype=torch.float64)
    return out
