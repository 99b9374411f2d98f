"""What measured times depend on beside the shape, and the folder that they are kept in."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import torch

CACHE_VARIABLE = "HF_SPARSE_CACHE"


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
