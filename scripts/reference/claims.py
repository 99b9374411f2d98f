"""Test three claims of the papers on the reference results: shown, refuted, undecided or not measured.

A claim is tested on pairs of results with the same task, model and number of steps. It is shown if the difference has
the claimed sign in every seed of at least two, and refuted if it has the other sign in every seed of at least two.
Where seeds disagree, the 95 % interval of the mean of five or more decides: shown above 0, refuted below 0, and refuted
too if it contains 0, since users cannot count on a gain that so many runs do not show. Otherwise it is undecided.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hf_sparse.analysis.pareto import LOWER
from hf_sparse.analysis.results import Result, by_name
from hf_sparse.profiling.speed_record import Speed

MAIN = {"sst2": "accuracy", "mrpc": "accuracy", "rte": "accuracy", "stsb": "pearson", "g2p": "wer"}
"""Main metric of each task."""

ELEMENT = ("magnitude", "movement", "soft movement")
EQUAL = 0.005
"""Metrics closer than this count as equal where speeds are compared."""

ENOUGH = 5
"""Number of seeds that decides although they disagree."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a claim for one pair of results.

    Args:
        claim: in words.
        where: names of the two results.
        outcome: shown, refuted, undecided or not measured.
        seeds: number of pairs; None = does not apply.
        figures: values and differences.
    """

    claim: str
    where: str
    outcome: str
    seeds: int | None
    figures: str


class _Row(NamedTuple):
    where: str
    outcome: str
    seeds: int | None
    figures: str


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Return the verdicts, claim by claim; a claim without a pair of results has one verdict, "not measured"."""
    out: list[Verdict] = []
    for claim, found in (
        ("movement better than magnitude at 10 % remaining or fewer", list(_movement(results))),
        ("distillation better than none", list(_distilled(results))),
        ("hybrid blocks faster than unstructured sparsity at equal accuracy", list(_hybrid(results))),
    ):
        out += [Verdict(claim, *row) for row in found] or [Verdict(claim, "-", "not measured", None, "-")]
    return out


def decided(differences: Sequence[float]) -> str:
    """Return the outcome of a claim that differences, one for each seed, are above 0.

    Example:
        >>> [decided(seeds) for seeds in ([0.1, 0.2], [-0.1, -0.2], [0.1, -0.1], [0.1], [])]
        ['shown', 'refuted', 'undecided', 'undecided', 'not measured']
        >>> [decided(seeds) for seeds in ([0.1, 0.2, 0.1, 0.2, -0.01], [0.1, -0.1, 0.1, -0.1, 0.1])]
        ['shown (on average)', 'refuted (no difference)']
    """
    if not differences:
        return "not measured"
    if len(differences) == 1:
        return "undecided"
    if all(value > 0 for value in differences):
        return "shown"
    if all(value < 0 for value in differences):
        return "refuted"
    if len(differences) < ENOUGH:
        return "undecided"
    low, high = interval(differences)
    return "shown (on average)" if low > 0 else "refuted (on average)" if high < 0 else "refuted (no difference)"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the bounds of the 95 % interval of a mean, by Student's t.

    Example:
        >>> [round(end, 3) for end in interval([0.1, 0.2, 0.1, 0.2, 0.15])]
        [0.088, 0.212]
    """
    from scipy import stats  # of the dev extra

    count, middle = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / count**0.5
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return middle - reach, middle + reach


def _pair(claimed: Sequence[Result], other: Sequence[Result]) -> _Row | None:
    """Compare two results seed by seed, or return None if they have no seed in common."""
    metric = MAIN[claimed[0].task]
    values = {run.seed: run.metrics[metric] for run in other}
    pairs = [(run.metrics[metric], values[run.seed]) for run in claimed if run.seed in values]
    if not pairs:
        return None
    sign = -1 if metric in LOWER else 1
    differences = [sign * (first - second) for first, second in pairs]
    first, second = (statistics.mean(side) for side in zip(*pairs, strict=True))
    each = " ".join(f"{value:+.3f}" for value in differences)
    if len(differences) >= ENOUGH:
        low, high = interval(differences)
        each += f", mean {statistics.mean(differences):+.3f} (95 %: {low:+.3f} to {high:+.3f})"
    figures = f"{metric} {first:.3f} against {second:.3f}; difference {each}"
    return _Row(f"{claimed[0].name} and {other[0].name}", decided(differences), len(pairs), figures)


def _movement(results: Sequence[Result]) -> Iterator[_Row]:
    for runs in by_name(results).values():
        first, how = runs[0], runs[0].how
        if how.name not in ("movement", "soft movement") or first.sparsity < 0.9:
            continue
        magnitude = [r for r in results if r.how == how._replace(name="magnitude") and _alike(r, first)]
        if row := _pair(runs, magnitude):
            yield row


def _distilled(results: Sequence[Result]) -> Iterator[_Row]:
    for runs in by_name(results).values():
        how = runs[0].how
        plain = [r for r in results if r.how == how._replace(teacher=None, hidden=False) and _alike(r, runs[0])]
        if how.teacher and (row := _pair(runs, plain)):
            yield row


def _hybrid(results: Sequence[Result]) -> Iterator[_Row]:
    groups = by_name(result for result in results if result.speed)
    for runs in groups.values():
        if runs[0].how.name == "hybrid":
            yield _compared_speed(runs[0], [rivals[0] for rivals in groups.values()], results)


def _compared_speed(hybrid: Result, timed: Sequence[Result], results: Sequence[Result]) -> _Row:
    """Compare a hybrid result with the fastest unstructured one of equal accuracy."""
    metric, speed = MAIN[hybrid.task], Speed.from_dict(hybrid.speed)
    value = _mean(results, hybrid, metric)
    sign = -1 if metric in LOWER else 1
    rivals = [
        (Speed.from_dict(rival.speed).speedup, rival)
        for rival in timed
        if rival.how in [hybrid.how._replace(name=name) for name in ELEMENT]
        and _alike(rival, hybrid, "sparsity")
        and Speed.from_dict(rival.speed).machine == speed.machine
        and sign * (_mean(results, rival, metric) - value) >= -EQUAL
    ]
    low, median, high = speed.speedup
    if not rivals:
        reason = f"no unstructured result with a measured speed is as good as {value:.3f}"
        return _Row(f"{hybrid.name}, {median:.2f}x", "not measured", None, reason)
    theirs, rival = max(rivals, key=lambda item: item[0][1])
    outcome = "shown" if low > theirs[2] else "refuted" if high < theirs[0] else "undecided"
    figures = f"{median:.2f}x at {metric} {value:.3f} against {theirs[1]:.2f}x at {_mean(results, rival, metric):.3f}"
    return _Row(f"{hybrid.name} and {rival.name}", outcome, None, figures)


def _mean(results: Sequence[Result], like: Result, metric: str) -> float:
    return statistics.mean(result.metrics[metric] for result in results if result.name == like.name)


def _alike(one: Result, other: Result, *ignored: str) -> bool:
    same = {"task", "model", "sparsity", "steps"}.difference(ignored)
    return all(getattr(one, key) == getattr(other, key) for key in same)
