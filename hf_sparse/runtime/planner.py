"""Decide what of a model is packed: time each candidate where that is requested, and give the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .autotune import DECODING, Measurement, SpeedTable, Trial, why_dense
from .candidates import CandidateGroup, Candidates, PackCandidate
from .survey import LayerDecision

TOKENS = (17, 65, 200, 1024)
"""Token counts that are timed: one above a multiple of 16, where a tile of tokens has most padding."""

DECODING_TOKENS = (1, 2, 5, 8)
"""Token counts that are timed in addition for a model that generates: one token of each sequence."""

Decisions = Mapping[str, LayerDecision]


def choose(
    group: CandidateGroup, decisions: Decisions, table: SpeedTable | None, tokens: Sequence[int]
) -> tuple[list[PackCandidate], dict[str, LayerDecision]]:
    """Return which candidates of a group are packed, and the decisions about all its layers.

    Args:
        table: of times; None = pack without timing.
        tokens: token counts that are timed.
    """
    candidate = group.candidate
    measured = measure(candidate, table, tokens) if table is not None else {}
    speedups = {count: each.speedup for count, each in measured.items()}
    reason = why_dense(candidate.report_name, measured) if measured else None
    if reason is None:
        kernel = candidate.report_name
        return [candidate], {name: decisions[name].takes(kernel, speedups) for name in candidate.names}
    chosen: list[PackCandidate] = []
    changed = {name: decisions[name].stays_dense(reason, speedups) for name in candidate.names}
    for single in group.split():
        packed, decided = choose(CandidateGroup(single, list), decisions, table, tokens)
        chosen += packed
        changed |= decided
    return chosen, changed


def choose_for_decoding(
    group: CandidateGroup,
    rivals: Candidates,
    decisions: Decisions,
    table: SpeedTable,
    tokens: Sequence[int],
) -> tuple[list[PackCandidate], dict[str, LayerDecision]]:
    """Return the same as `choose`, of two kernels that which needs less time for a few tokens.

    Args:
        rivals: makes candidates for the other kernel, which packs layers one by one.
    """
    chosen, decided = choose(group, decisions, table, tokens)
    other: list[PackCandidate] = []
    others: dict[str, LayerDecision] = {}
    for name in group.candidate.names:
        packed, each = choose(CandidateGroup(rivals.single(name), list), decisions, table, tokens)
        other += packed
        others |= each
    few = [count for count in tokens if count <= DECODING]
    if other and _seconds(other, group, table, few) < _seconds(chosen, group, table, few):
        return other, others
    return chosen, decided


def _seconds(chosen: Sequence[PackCandidate], group: CandidateGroup, table: SpeedTable, few: Sequence[int]) -> float:
    """Return the time of a group of layers at a few tokens, those that are not chosen dense."""
    packed = {name for candidate in chosen for name in candidate.names}
    total = sum(each.packed for candidate in chosen for each in measure(candidate, table, few).values())
    rest = [candidate for candidate in group.split() or [group.candidate] if not packed.intersection(candidate.names)]
    return total + sum(each.dense for candidate in rest for each in measure(candidate, table, few).values())


def measure(candidate: PackCandidate, table: SpeedTable, tokens: Sequence[int]) -> dict[int, Measurement]:
    """Return the times of a candidate, dense and packed, by token count."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in candidate.layers)
    total = sum(layer.weight.numel() for layer in candidate.layers)
    shapes = tuple(tuple(layer.weight.shape) for layer in candidate.layers)
    rows = tuple(packed.rows for packed in candidate.packed)
    kind = candidate.report_name
    if (size := candidate.head_size) is not None:
        kind, shapes = "sparse_attention", (*shapes, (candidate.layers[0].out_features // size, size))
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


def token_counts(model: nn.Module, tokens: Sequence[int] | None) -> Callable[[PackCandidate], Sequence[int]]:
    """Return a function that gives the token counts at which a candidate is timed.

    A model that generates reads one token of each sequence at every step; its encoder, if it has one, reads whole
    sequences.

    Args:
        tokens: the requested counts; None = what fits the model.
    """
    if tokens is not None:
        requested = sorted(set(tokens))
        return lambda candidate: requested
    if not generates(model):
        return lambda candidate: TOKENS
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder_of: Any = getattr(model, "get_encoder", None) if has_encoder else None
    encoder = set(encoder_of().modules()) if callable(encoder_of) else set()
    return lambda candidate: TOKENS if candidate.layers[0] in encoder else (*DECODING_TOKENS, *TOKENS)
