"""Decide what of a model is packed: time each candidate where that is requested, and give the reason."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import KERNELS
from .autotune import DECODING, TOLERANCE, Measurement, SpeedTable, Trial, why_dense
from .candidates import CandidateGroup, Candidates, PackCandidate
from .survey import LayerDecision

TOKENS = (17, 65, 200, 1024)
"""Token counts that are timed: one above a multiple of 16, where a tile of tokens has most padding."""

DECODING_TOKENS = (1, 2, 5, 8)
"""Token counts that are timed in addition for a model that generates: one token of each sequence."""

BETWEEN_TOKENS = (9, 16)
"""Token counts between those and the others, for the same: where a tile of 16 is filled least, and where it is full."""

SHORT_TOKENS = (1, 2, 3, 4, 7, 9, 15)
"""Token counts that are timed in addition for other models, to find up to which one they compute with dense weights.

With them where kernels gain least: 3 and 7 tokens are the most that blocks of 4 and more rows compute one by one, and 9
leave most of the second register of 8 empty.
"""

Decisions = Mapping[str, LayerDecision]


class TokenCounts(NamedTuple):
    """Token counts that are timed.

    Attributes:
        needed: where the kernel has to be faster.
        short: below the others; the dense weights are kept for those where it is not faster.
    """

    needed: Sequence[int]
    short: Sequence[int] = ()


class Choice(NamedTuple):
    """What was decided about a group of layers.

    Attributes:
        packed: the candidates that are packed.
        decisions: about all its layers, by name.
        seconds: time of all its layers together, by token count; empty if nothing was timed.
    """

    packed: list[PackCandidate]
    decisions: dict[str, LayerDecision]
    seconds: dict[int, float]


def choose(
    group: CandidateGroup,
    decisions: Decisions,
    table: SpeedTable | None,
    tokens: Sequence[int],
    short: Sequence[int] = (),
) -> Choice:
    """Return which candidates of a group are packed: all together, else layer by layer.

    Args:
        table: of times; None = pack without timing.
        tokens, short: see `TokenCounts`.
    """
    candidate = group.candidate
    kernel, names = candidate.report_name, candidate.names
    measured = measure(candidate, table, tokens) if table is not None else {}
    speedups = {count: each.speedup for count, each in measured.items()}
    reason = why_dense(kernel, measured) if measured else None
    if reason is None:
        few = measure(candidate, table, short) if table is not None and short else {}
        limit = dense_up_to(few, min(measured, default=0))
        speedups = {count: each.speedup for count, each in few.items() if count > limit} | speedups
        candidate = dataclasses.replace(candidate, dense_up_to=limit)
        decided = {name: decisions[name].takes(kernel, speedups) for name in names}
        return Choice([candidate], decided, {count: each.packed for count, each in measured.items()})
    dense = {name: decisions[name].stays_dense(reason, speedups) for name in names}
    singles = [CandidateGroup(single, list) for single in group.split()]
    if not singles:
        return Choice([], dense, {count: each.dense for count, each in measured.items()})
    return _together([choose(single, decisions, table, tokens, short) for single in singles])


def dense_up_to(measured: Mapping[int, Measurement], above: int) -> int:
    """Return the largest token count at which dense weights are used; 0 = nowhere.

    Args:
        measured: times at short counts.
        above: a count, longer than those, where the kernel is faster.

    Example:
        >>> slow, fast = Measurement(1.0, 1.2, 0.8), Measurement(1.0, 0.5, 1.9)
        >>> dense_up_to({1: slow, 4: fast, 8: slow, 15: fast}, 17), dense_up_to({1: slow, 8: slow}, 17)
        (14, 16)
    """
    limit = 0
    for count, following in itertools.pairwise([*sorted(measured), above]):
        if measured[count].speedup < 1.0 + TOLERANCE:
            limit = following - 1
    return limit


def choose_for_decoding(
    group: CandidateGroup,
    rivals: Candidates,
    decisions: Decisions,
    table: SpeedTable,
    tokens: Sequence[int],
) -> Choice:
    """Return the same as `choose`, of two kernels that which needs less time for a few tokens.

    Args:
        rivals: makes candidates for the other kernel.
    """
    choice = choose(group, decisions, table, tokens)
    names = group.candidate.names
    other = _together([choose(each, decisions, table, tokens) for each in rivals.of(names)])
    few = [count for count in tokens if count <= DECODING]
    faster = sum(other.seconds[count] for count in few) < sum(choice.seconds[count] for count in few)
    return other if other.packed and faster else choice


def _together(choices: Sequence[Choice]) -> Choice:
    """Return the choice about several groups."""
    packed = [candidate for choice in choices for candidate in choice.packed]
    decisions = {name: decided for choice in choices for name, decided in choice.decisions.items()}
    counts = choices[0].seconds
    return Choice(packed, decisions, {count: sum(choice.seconds[count] for choice in choices) for count in counts})


def measure(candidate: PackCandidate, table: SpeedTable, tokens: Sequence[int]) -> dict[int, Measurement]:
    """Return the times of a candidate, dense and packed, by token count."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in candidate.layers)
    total = sum(layer.weight.numel() for layer in candidate.layers)
    shapes = tuple(tuple(layer.weight.shape) for layer in candidate.layers)
    rows = tuple(packed.rows for packed in candidate.packed)
    kind = candidate.report_name
    if (size := candidate.head_size) is not None:
        kind = KERNELS[candidate.kernel].report_name("attention")
        shapes = (*shapes, (candidate.layers[0].out_features // size, size))
    measured = {}
    for count in tokens:
        x = torch.randn(1, count, candidate.layers[0].in_features, dtype=torch.float32, device="cpu")
        trial = Trial(kind, shapes, round(100 * zeros / total), rows, count)
        measured[count] = table.measure(trial, candidate.dense_run(x), candidate.packed_run(x))
    return measured


def generates(model: nn.Module) -> bool:
    """Return whether a model generates, one token of each sequence at a step."""
    can = getattr(model, "can_generate", None)
    return bool(callable(can) and can())


def token_counts(model: nn.Module, tokens: Sequence[int] | None) -> Callable[[PackCandidate], TokenCounts]:
    """Return a function that gives the token counts at which a candidate is timed.

    A model that generates reads one token of each sequence at every step; its encoder, if it has one, and other models
    read whole sequences, of which some are short.

    Args:
        tokens: the requested counts; None = what fits the model.
    """
    if tokens is not None:
        requested = TokenCounts(sorted(set(tokens)))
        return lambda candidate: requested
    whole = TokenCounts(TOKENS, SHORT_TOKENS)
    if not generates(model):
        return lambda candidate: whole
    steps = TokenCounts((*DECODING_TOKENS, *BETWEEN_TOKENS, *TOKENS))
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder_of: Any = getattr(model, "get_encoder", None) if has_encoder else None
    encoder = set(encoder_of().modules()) if callable(encoder_of) else set()
    return lambda candidate: whole if candidate.layers[0] in encoder else steps
