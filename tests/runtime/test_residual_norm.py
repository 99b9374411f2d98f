"""A runtime model under what torch does to models: compilers, forked workers, threads."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.kernels import library_status
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

BACKEND = "cpu" if library_status().available else "csr"

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler, and there is none"
)


def runtime(family: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Return a runtime model, inputs, and what the dense one answered."""
    model, inputs = sparse(family, **options), batch(family)
    inputs = {key: value for key, value in inputs.items() if key != "labels" or family.startswith("t5")}
    expected = answers(model, inputs)
    to_runtime(model, BACKEND)
    return model, inputs, expected


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "t5-gated"])
def test_inductor_compiles_a_runtime_model_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, inputs, expected = runtime(family)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(answers(compiled, inputs), expected, atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.slow
def test_inductor_takes_other_numbers_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = sparse("bert")
    dense = copy.deepcopy(model)
    to_runtime(model, BACKEND)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, dynamic=True)
    for shape in ((1, 4), (3, 5), (2, 9)):
        inputs = {"input_ids": torch.randint(0, 30, shape)}
        torch.testing.assert_close(answers(compiled, inputs), answers(dense, inputs), atol=1e-5, rtol=1e-5)


def test_model_that_comes_back_is_compiled_anew() -> None:
    model, inputs, expected = runtime("bert")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(answers(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    to_dense_runtime(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias.add_(1.0)
    torch.testing.assert_close(answers(compiled, inputs), answers(model, inputs), atol=1e-5, rtol=1e-5)


def test_exported_program_takes_other_batches_and_is_saved(tmp_path: Path) -> None:
    model = sparse("bert")
    dense = copy.deepcopy(model)
    to_runtime(model, BACKEND)
    ids = torch.randint(0, 30, (2, 6))
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": {0: torch.export.Dim("batch", min=1, max=64)}}
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for size in (1, 2, 5):
            ids = torch.randint(0, 30, (size, 6))
            torch.testing.assert_close(loaded(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


class Answers(Dataset):
    """Items that a runtime model computes, in whichever process asks."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return answers(self.model, self.inputs)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader_compute_with_a_model_that_was_used(start: str) -> None:
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    model, inputs, expected = runtime("bert")
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # so that a pool of threads exists when the workers begin
    try:
        wide = {key: value.repeat(16, 1) for key, value in inputs.items()}
        answers(model, wide)
        loader: Any = DataLoader(
            Answers(model, inputs),
            batch_size=None,
            num_workers=2,
            timeout=60 if start == "fork" else 600,
            multiprocessing_context=start,
        )
        found = list(loader)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 6
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_several_models_answer_in_threads_at_once() -> None:
    made = [runtime(family, sparsity=sparsity) for family in ("bert", "t5") for sparsity in (0.5, 0.9)]
    wrong: list[int] = []

    def work(number: int) -> None:
        model, inputs, expected = made[number]
        found = [answers(model, inputs) for _ in range(20)]
        wrong.extend(number for each in found if not torch.allclose(each, expected, atol=1e-5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(made)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
