"""Small sparse models for the tests of the runtime, and clocks that do not measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse import SparsityConfig, sparsify
from hf_sparse.profiling.timer import Run
from hf_sparse.runtime import SpeedTable
from hf_sparse.runtime.autotune import Measurement, Trial
from tests.helpers import decoders
from tests.helpers.structures import build


def sparse(family: str, sparsity: float = 0.8, pattern: Any = "element", **options: Any) -> Any:
    """Return a pruned model of a family."""
    model = build(family, **options)
    sparsify(model, SparsityConfig(sparsity=sparsity, pattern=pattern))
    return model.eval()


def round_to_bfloat16(model: nn.Module) -> None:
    """Leave parameters in float32 that bfloat16 holds exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def sparse_decoder(family: str) -> Any:
    """Return a decoder with half of its weights zero and the others such that bfloat16 holds them."""
    model = decoders.build(family)
    round_to_bfloat16(model)
    sparsify(model, SparsityConfig(sparsity=0.5))
    return model.eval()


def answers(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of a model."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


class Fixed:
    """A clock that says what it is told: dense takes 1 s, a packed product what its kernel is given here."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[Trial] = []

    def __call__(self, trial: Trial, dense: Run, packed: Run) -> Measurement:
        self.asked.append(trial)
        seconds = self.seconds.get(trial.kind, 0.5)
        return Measurement(1.0, seconds, 1.0 / seconds)


def table(path: Any, **seconds: float) -> SpeedTable:
    """Return a table of times that come from `Fixed`."""
    return SpeedTable(path / "runtime.json", Fixed(**seconds))
