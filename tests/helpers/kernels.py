"""Kernels that a test pretends are there, or missing."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

from hf_sparse.kernels import KERNELS


def _returned(reason: str | None) -> str | None:
    return reason


def pretend(monkeypatch: pytest.MonkeyPatch, **unavailable: str | None) -> None:
    """Let kernels of the registry be unavailable for a reason, or available (None) in plain torch."""
    for name, reason in unavailable.items():
        kernel = dataclasses.replace(KERNELS[name], unavailable=partial(_returned, reason))
        monkeypatch.setitem(KERNELS._kernels, name, kernel)
