"""Which entries of a Trainer's evaluation are metrics of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BESIDE_METRICS = ("runtime", "samples_per_second", "steps_per_second", "sparsity")
"""What an evaluation logs beside metrics: its time, and the sparsity that `SparsityCallback` adds."""


def measured(results: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, float]:
    """Return the metrics among the results of an evaluation, without their prefix "eval_".

    Args:
        results: as `eval_results.json` holds them.
        without: more names to leave out, such as "loss".

    Example:
        >>> measured({"eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 1.0, "epoch": 3.0}, without=["loss"])
        {'accuracy': 0.9}
    """
    left_out = {*BESIDE_METRICS, *without}
    named = {str(key).removeprefix("eval_"): value for key, value in results.items() if str(key).startswith("eval_")}
    return {key: value for key, value in named.items() if key not in left_out and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)  # a loss may be NaN, and is reported
