"""A file of measured times. It only saves time: without it, or with a unreadable one, everything is measured again."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from ..utils.atomic_io import write_text
from .machine import CACHE_VARIABLE, cache_folder

logger = logging.getLogger(__name__)

LOCK_SECONDS = 10.0
"""How long to wait for another process that writes."""

Check = Callable[[list[float]], bool]


class MeasurementCache:
    """Lists of times by what was measured, in a JSON file that several processes may write.

    Times are kept in memory too. If the file cannot be read or written (a read-only home directory, a full disk), a
    warning says so once, and the cache works without it.

    Args:
        path: of the file; None = `name` in `cache_folder()`.

    Example:
        >>> import tempfile
        >>> cache = MeasurementCache(Path(tempfile.mkdtemp()) / "times.json")
        >>> cache.get("a layer", lambda: [1.0, 2.0])
        [1.0, 2.0]
        >>> MeasurementCache(cache.path).get("a layer", lambda: [9.0, 9.0])
        [1.0, 2.0]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, name: str = "times.json") -> None:
        self.path = Path(path) if path is not None else cache_folder() / name
        self._memory: dict[str, list[float]] = {}
        self._warned = False

    def get(self, key: str, measure: Callable[[], list[float]], valid: Check = bool, keep: Check = bool) -> list[float]:
        """Return the times of a key, measured if they are unknown.

        Args:
            valid: what known times have to fulfil; others are measured again.
            keep: what measured times have to fulfil to be written into the file; others are for this process alone.
        """
        for known in (self._memory, self.read()):
            if key in known and valid(known[key]):
                return known[key]
        times = measure()
        self._memory[key] = times
        if keep(times):
            self.add({key: times})
        return times

    def read(self) -> dict[str, list[float]]:
        """Return what the file holds, without entries that are not times."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: times for key, times in content.items() if _are_times(times)}

    def add(self, times: Mapping[str, list[float]]) -> None:
        """Write times into the file, beside what other processes have written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
                write_text(self.path, json.dumps({**self.read(), **times}, indent=1))
        except (OSError, Timeout, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            if not self._warned:
                logger.warning(
                    "cannot write the measured times to %s (%s): they are measured again in the next process. Set "
                    "%s to a folder that can be written",
                    self.path,
                    error,
                    CACHE_VARIABLE,
                )
            self._warned = True


def _are_times(value: object) -> bool:
    return isinstance(value, list) and all(
        type(time) in (int, float) and math.isfinite(time) and 0.0 <= time < 1e6 for time in value
    )
