"""A process that forks after it has used the kernels with threads, as data loaders and servers do."""

from __future__ import annotations

import os

import pytest
import torch

from hf_sparse.kernels import KERNELS
from hf_sparse.kernels.dense_gemv import FEW
from tests.helpers.kernels import NATIVE, sparse

OWN_THREADS = [name for name, kernel in KERNELS._kernels.items() if kernel.isas]
"""Kernels in C++; those in plain torch do with a fork what torch does."""


@pytest.mark.skipif(not hasattr(os, "fork") or NATIVE is None, reason="needs fork and the C++ kernels")
@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("tokens", [1, 8, 150])
@pytest.mark.parametrize("name", OWN_THREADS)
def test_fork_after_use_does_not_hang(name: str, tokens: int) -> None:
    kernel, weight, x = KERNELS[name], sparse(200, 300, 0.8), torch.randn(tokens, 300)
    if (why := kernel.unavailable()) is not None:
        pytest.skip(why)
    if name == "dense_few" and tokens > FEW:
        pytest.skip("so many tokens are computed by torch")
    parts = kernel.layout.pack(weight, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = kernel.op(x, *parts, None, 1, 200, 300)
        child = os.fork()
        if child == 0:
            same = torch.equal(kernel.op(x, *parts, None, 1, 200, 300), wanted)
            os._exit(0 if same else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
