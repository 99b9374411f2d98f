"""Eight threads call one model at once: the same bits as one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import to_runtime
from hf_sparse.kernels import KERNELS
from tests.helpers import decoders
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import sparse, sparse_decoder
from tests.helpers.structures import VOCABULARY

CALLERS = 8
LENGTHS = (1, 3, 8, 17, 20, 31)


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    for kernel in KERNELS.of_device("cpu"):
        if kernel.unavailable():
            pretend(monkeypatch, **{kernel.name: None})


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_once(work: Callable[[int], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Return what each caller gets, all of them started together.

    Args:
        work: (number of the caller) -> its outputs.
    """
    found: list[Any] = [None] * CALLERS
    start = threading.Barrier(CALLERS)

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = work(number)
        except BaseException as error:  # noqa: BLE001  a thread would only print it
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def inputs_of(number: int) -> list[dict[str, Tensor]]:
    """Return inputs of all lengths, other ones for each caller, in another order, some padded."""
    generator = torch.Generator().manual_seed(number)
    lengths = (*LENGTHS[number % len(LENGTHS) :], *LENGTHS[: number % len(LENGTHS)])
    out = []
    for length in lengths:
        ids = torch.randint(5, VOCABULARY, (1 + number % 3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - length // 3 :] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


@torch.inference_mode()
def outputs(model: Any, number: int, repeat: int = 1) -> list[Tensor]:
    return [model(**each).logits for _ in range(repeat) for each in inputs_of(number)]


@pytest.mark.parametrize(("backend", "threads"), [("cpu", 1), ("cpu", 2), ("cpu-int8", 1), ("cpu-int8", 2), ("csr", 1)])
def test_encoder_gives_every_caller_the_same_bits(backend: str, threads: int) -> None:
    model = sparse("bert", hidden_size=32, intermediate_size=64)
    to_runtime(model, backend)
    with threads_of_torch(threads):
        expected = [outputs(model, number) for number in range(CALLERS)]
        found = at_once(lambda number: outputs(model, number, repeat=2))
    for number, each in enumerate(found):
        assert all(map(torch.equal, each, expected[number] * 2)), number


@pytest.mark.parametrize(
    "backend", ["cpu", *(kernel.backend for kernel in KERNELS.of_device("cpu") if kernel.few_tokens)]
)
def test_decoder_generates_the_same_for_every_caller(backend: str) -> None:
    model = sparse_decoder("llama")
    to_runtime(model, backend)

    def generated(number: int, repeat: int = 1) -> list[Tensor]:
        ids = torch.randint(5, decoders.VOCABULARY, (1, 3 + number), generator=torch.Generator().manual_seed(number))
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        options |= {"output_scores": True, "return_dict_in_generate": True}
        done = [model.generate(ids, **options) for _ in range(repeat)]
        return [tensor for each in done for tensor in (each.sequences, *each.scores)]

    expected = [generated(number) for number in range(CALLERS)]
    found = at_once(lambda number: generated(number, repeat=2))
    for number, each in enumerate(found):
        assert all(map(torch.equal, each, expected[number] * 2)), number


def test_layers_of_one_matmul_called_by_themselves() -> None:
    """Query, key and value keep the result of the first for the others: each thread its own."""
    model = sparse("bert", hidden_size=32, intermediate_size=64)
    to_runtime(model, "cpu")
    attention = model.bert.encoder.layer[0].attention.self
    inputs = [torch.randn(1, 5 + number, 32) for number in range(CALLERS)]

    @torch.no_grad()
    def work(number: int) -> list[Tensor]:
        layers = (attention.query, attention.key, attention.value)
        return [layer(inputs[number]) for _ in range(20) for layer in layers]

    expected = [work(number) for number in range(CALLERS)]
    for number, each in enumerate(at_once(work)):
        assert all(map(torch.equal, each, expected[number])), number
