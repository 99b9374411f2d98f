"""What measured times depend on beside the shape, and the folder that they are kept in."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from pathlib import Path

import torch

CACHE_VARIABLE = "HF_SPARSE_CACHE"
_MIN_ELAPSED = 0.1
"""Seconds below which ticks of 10 ms say nothing of who used a CPU."""


def machine() -> str:
    """Return processor, number of threads and version of torch.

    Example:
        >>> "threads" in machine()
        True
    """
    cpu = Path("/proc/cpuinfo")
    name = processor_of(cpu.read_text(encoding="utf-8", errors="replace")) if cpu.is_file() else ""
    processor = name or platform.processor() or platform.machine()
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
    """Return the folder that HF_SPARSE_CACHE names, or ~/.cache/hf_sparse.

    Without a home directory it is one below the temporary files of this user.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "hf_sparse"
    except RuntimeError:  # no HOME, and the user has no entry in the password database
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"hf_sparse-{user}"


class CpusOfOthers:
    """Count the CPUs that other programs keep busy, from here to `stop`, as /proc/stat of Linux has it; elsewhere 0.

    Example:
        >>> CpusOfOthers().stop() >= 0.0
        True
    """

    def __init__(self) -> None:
        self._began, self._others = time.perf_counter(), self._seconds()

    def stop(self) -> float:
        """Return the CPUs, on average."""
        elapsed = time.perf_counter() - self._began
        if elapsed < _MIN_ELAPSED:
            return 0.0
        return max(0.0, self._seconds() - self._others) / elapsed

    @staticmethod
    def _seconds() -> float:
        try:
            with open("/proc/stat", encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return 0.0
        return busy - time.process_time()
