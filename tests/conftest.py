"""What all tests share: no network, few threads, one seed, and a reason for every skipped GPU test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before transformers is imported anywhere: it reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState

SLOW_TIMEOUT = 1200
"""Seconds that a slow test may take; the others have the limit of pyproject.toml."""

# The same examples in every run, and no deadline: a shared machine is no stopwatch.
hypothesis.settings.register_profile("hf_sparse", derandomize=True, deadline=None)
hypothesis.settings.load_profile("hf_sparse")

# Models here are tiny: a second thread only waits for the first, and on a busy machine for much longer.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def accelerate_environment() -> Iterator[None]:
    """Take back what a Trainer with torch.compile leaves in the environment and in accelerate."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    left = [name for name in os.environ if name.startswith("ACCELERATE_")]
    if set(left) != set(before):
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in left:
        del os.environ[name]
    os.environ.update(before)
