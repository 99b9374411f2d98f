"""Kernels that a test pretends are there, or missing; weights, inputs and masks for operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse.kernels import KERNELS, LibraryStatus, library
from hf_sparse.kernels.library import Library, NativeOps
from hf_sparse.runtime import convert

NATIVE = library.library()
WAYS = ["torch", *(NATIVE.isas if NATIVE else [])]
"""In which an operator computes here: plain torch, and each instruction set of the library."""


def int8_ways() -> dict[str, NativeOps]:
    """Return the int8 kernels of each instruction set that has some here."""
    loaded = {isa: Library(NATIVE.path, isa).int8 for isa in NATIVE.isas} if NATIVE else {}
    return {isa: native for isa, native in loaded.items() if native is not None}


def _returned(reason: str | None) -> str | None:
    return reason


def pretend(monkeypatch: pytest.MonkeyPatch, **unavailable: str | None) -> None:
    """Let kernels of the registry be unavailable for a reason, or available (None) in plain torch."""
    for name, reason in unavailable.items():
        kernel = dataclasses.replace(KERNELS[name], unavailable=partial(_returned, reason))
        monkeypatch.setitem(KERNELS._kernels, name, kernel)


def all_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels for the CPU count as there: without the library they compute the same in plain torch."""
    for kernel in KERNELS.of_device("cpu"):
        if kernel.unavailable():
            pretend(monkeypatch, **{kernel.name: None})


def built_for_test(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the runtime believe in a library, whose kernels of these names compute in plain torch."""
    status = LibraryStatus(True, None, "test", "as if they were there")
    monkeypatch.setattr(convert, "library_status", lambda: status)
    pretend(monkeypatch, **dict.fromkeys(names))


def use_way(monkeypatch: pytest.MonkeyPatch, module: Any, way: str) -> None:
    """Let the operators of a module compute in one of `WAYS`."""
    chosen = Library(NATIVE.path, way) if NATIVE and way != "torch" else None
    monkeypatch.setattr(module, "library", lambda: chosen)


def sparse(out: int, width: int, zeros: float) -> Tensor:
    """Return a weight with this fraction of zeros, one of its rows empty."""
    weight = torch.randn(out, width) * (torch.rand(out, width) >= zeros)
    if out > 2:
        weight[out // 2] = 0
    return weight


def odd_inputs() -> Iterator[Tensor]:
    """Yield inputs of 30 features: without a batch, with an empty one, with several dimensions, with strides."""
    yield from (torch.randn(30), torch.randn(0, 30), torch.randn(2, 0, 30), torch.randn(2, 3, 30))
    yield from (torch.randn(30, 50).T, torch.randn(50, 60)[::2, ::2], torch.randn(1, 30).expand(40, 30))


def masks(length: int) -> Iterator[Tensor]:
    """Yield attention masks for three sequences: of keys, causal, both, and as numbers that are added."""
    keys = torch.arange(length) < torch.tensor([[length], [length - 5], [1]])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    yield from (keys[:, None, None, :], keys[:, None, None, :].expand(3, 1, length, length))
    yield from (causal[None, None], causal & keys[:, None, None, :])
    yield torch.randn(3, 1, length, length)
    yield torch.randn(1, 1, length, length).masked_fill(~causal, -torch.inf)
    yield torch.randn(3, 1, length, length).masked_fill(~causal, torch.finfo(torch.float32).min)
    yield torch.randn(3, 1, length, 2 * length)[..., ::2]
