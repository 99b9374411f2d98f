"""What all tests share: no network, few threads, one seed, and a reason for every skipped GPU test."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

# Before transformers is imported anywhere: it reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from _pytest.logging import LogCaptureHandler

SLOW_TIMEOUT = 1200
"""Seconds that a slow test may take; the others have the limit of pyproject.toml."""

TIME_OVER = float(os.environ.get("HF_SPARSE_TESTS_UNTIL", "inf"))
"""Seconds since the epoch, set by .ci/run: tests that have not begun by then are skipped, and counted in the summary.

On a slow machine the server would end the run otherwise, with no result of any test.
"""

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > TIME_OVER:
        pytest.skip("not run: the time for tests is over (HF_SPARSE_TESTS_UNTIL)")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """Take back what a compiled Trainer leaves: a later `Accelerator()` in this process would compile its model too.

    All Accelerators share `AcceleratorState`, which keeps the `dynamo_plugin` of the first. A Trainer is not affected:
    `TrainingArguments` resets that state.
    """
    yield
    accelerate: Any = sys.modules.get("accelerate.state")
    state = {} if accelerate is None else accelerate.AcceleratorState._shared_state
    if "dynamo_plugin" in state and state["dynamo_plugin"].backend.value != "NO":
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def listeners() -> Iterator[None]:
    """Take handlers of pytest off the loggers that a test has put them on: one handler serves the whole session."""
    yield
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("hf_sparse") and isinstance(logger, logging.Logger):
            for handler in [each for each in logger.handlers if isinstance(each, LogCaptureHandler)]:
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
