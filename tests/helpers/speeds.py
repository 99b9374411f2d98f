"""What `hf-sparse bench` writes, for tests of what reads it."""

from __future__ import annotations

from typing import Any


def speed_file(gain: float = 2.0, **setting: Any) -> dict[str, Any]:
    """Return the JSON of timings of a model that takes 4 ms."""
    said = {
        "model": "small", "against": "dense", "machine": "Box 9", "threads": 2, "dtype": "float32", "batch": 8,
        "length": 64,
    }  # fmt: skip
    return {
        "setting": {**said, **setting},
        "difference": 0.0,
        "dense": {"seconds": [0.004 * gain] * 3, "bytes": 4_000_000},
        "runtime": {"seconds": [0.0039, 0.004, 0.0041], "bytes": 2_000_000},
        "speedup": [0.9 * gain, gain, 1.1 * gain],
    }
