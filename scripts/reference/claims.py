"""What the reference results say about three claims of the papers: shown, refuted, undecided or not measured.

A claim is about pairs of results of one task and as many steps: shown if the difference has the claimed sign in every
seed of at least two, refuted if it has the other sign in every seed of at least two. Where seeds disagree, five or more
of them decide by the 95 % interval of their mean: shown above 0, refuted below 0, and refuted too where it holds 0,
since a gain that so many runs do not show is none to count on. Undecided otherwise.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from hf_sparse.analysis.pareto import LOWER
from hf_sparse.analysis.results import Result, by_name
from hf_sparse.profiling.speed_record import Speed

MAIN = {"sst2": "accuracy", "mrpc": "accuracy", "rte": "accuracy", "stsb": "pearson", "g2p": "wer"}
"""The metric that a task is compared by."""

ELEMENT = ("magnitude", "movement", "soft movement")
EQUAL = 0.005
"""Metrics this near are called equal where speeds are compared."""

ENOUGH = 5
"""So many seeds decide although they disagree."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a claim for one pair: in words, and the figures behind them."""

    claim: str
    where: str
    said: str
    figures: str


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Return what the results say, claim by claim; one line says so where nothing was measured."""
    out: list[Verdict] = []
    for claim, found in (
        ("movement above magnitude at 10 % remaining or fewer", list(_movement(results))),
        ("distillation above none", list(_taught(results))),
        ("hybrid blocks faster than single weights at equal accuracy", list(_hybrid(results))),
    ):
        out += [Verdict(claim, *row) for row in found] or [Verdict(claim, "-", "not measured", "-")]
    return out


def decided(differences: Sequence[float]) -> str:
    """Return the word for differences, one for each seed, of which the claim says that they are above 0.

    Example:
        >>> [decided(seeds) for seeds in ([0.1, 0.2], [-0.1, -0.2], [0.1, -0.1], [0.1], [])]
        ['shown', 'refuted', 'undecided', 'undecided (one seed)', 'not measured']
        >>> [decided(seeds) for seeds in ([0.1, 0.2, 0.1, 0.2, -0.01], [0.1, -0.1, 0.1, -0.1, 0.1])]
        ['shown (on average)', 'refuted (no difference)']
    """
    if not differences:
        return "not measured"
    if len(differences) == 1:
        return "undecided (one seed)"
    if all(value > 0 for value in differences):
        return "shown"
    if all(value < 0 for value in differences):
        return "refuted"
    if len(differences) < ENOUGH:
        return "undecided"
    low, high = interval(differences)
    return "shown (on average)" if low > 0 else "refuted (on average)" if high < 0 else "refuted (no difference)"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of Student's t for a mean.

    Example:
        >>> [round(end, 3) for end in interval([0.1, 0.2, 0.1, 0.2, 0.15])]
        [0.088, 0.212]
    """
    from scipy import stats  # of the dev extra

    count, middle = len(differences), statistics.mean(differences)
    error = statistics.stdev(differences) / count**0.5
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return middle - reach, middle + reach


def _pair(better: Sequence[Result], other: Sequence[Result]) -> tuple[str, str] | None:
    metric = MAIN[better[0].task]
    values = {run.seed: run.metrics[metric] for run in other}
    both = [(run.metrics[metric], values[run.seed]) for run in better if run.seed in values]
    if not both:
        return None
    sign = -1 if metric in LOWER else 1
    differences = [sign * (mine - theirs) for mine, theirs in both]
    mine, theirs = (statistics.mean(side) for side in zip(*both, strict=True))
    each = " ".join(f"{value:+.3f}" for value in differences)
    if len(differences) >= ENOUGH:
        low, high = interval(differences)
        each += f", on average {statistics.mean(differences):+.3f} (95 %: {low:+.3f} to {high:+.3f})"
    return decided(differences), f"{metric} {mine:.3f} against {theirs:.3f}; better by {each}"


def _movement(results: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    for runs in by_name(results).values():
        first = runs[0]
        how = first.how
        if how.name not in ("movement", "soft movement") or first.sparsity < 0.9:
            continue
        twin = [r for r in results if r.how == how._replace(name="magnitude") and _alike(r, first)]
        if found := _pair(runs, twin):
            yield f"{first.name} and {twin[0].name}", *found


def _taught(results: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    for runs in by_name(results).values():
        how = runs[0].how
        plain = [r for r in results if r.how == how._replace(teacher=None, hidden=False) and _alike(r, runs[0])]
        if how.teacher and (found := _pair(runs, plain)):
            yield f"{runs[0].name} and {plain[0].name}", *found


def _hybrid(results: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    groups = by_name(result for result in results if result.speed)
    for runs in groups.values():
        first = runs[0]
        how = first.how
        if how.name != "hybrid":
            continue
        metric, timed = MAIN[first.task], Speed.from_dict(first.speed)
        mine = timed.speedup
        value = _mean(results, first, metric)
        others = [
            (Speed.from_dict(rivals[0].speed).speedup, rivals[0])
            for rivals in groups.values()
            if rivals[0].how in [how._replace(name=name) for name in ELEMENT]
            and _alike(rivals[0], first, "sparsity")
            and Speed.from_dict(rivals[0].speed).machine == timed.machine
        ]
        sign = -1 if metric in LOWER else 1
        equal = [rival for rival in others if sign * (_mean(results, rival[1], metric) - value) >= -EQUAL]
        if not equal:
            yield (
                f"{first.name}, {mine[1]:.2f}x",
                "not measured",
                f"no timed result of single weights is as good as {value:.3f}",
            )
            continue
        theirs, rival = max(equal, key=lambda rival: rival[0][1])
        said = "shown" if mine[0] > theirs[2] else "refuted" if mine[2] < theirs[0] else "undecided"
        figures = (
            f"{mine[1]:.2f}x at {metric} {value:.3f} against {theirs[1]:.2f}x at {_mean(results, rival, metric):.3f}"
        )
        yield f"{first.name} and {rival.name}", said, figures


def _mean(results: Sequence[Result], like: Result, metric: str) -> float:
    return statistics.mean(result.metrics[metric] for result in results if result.name == like.name)


def _alike(one: Result, other: Result, *but: str) -> bool:
    same = {"task", "model", "sparsity", "steps"}.difference(but)
    return all(getattr(one, key) == getattr(other, key) for key in same)
