"""A packed checkpoint comes into runtime form without its dense weights ever being in memory together."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import (
    BackendError,
    CheckpointError,
    SparseConfig,
    SparsityConfig,
    sparsify,
    to_dense_runtime,
    to_runtime,
)
from hf_sparse.kernels.library import library
from hf_sparse.runtime import SpeedTable, is_runtime
from hf_sparse.runtime.autotune import Measurement
from hf_sparse.runtime.lazy_weights import can_be_lazy, lazy_weight, materialize, peek
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

WHOLE = """
import sys
from pathlib import Path
import torch, transformers, hf_sparse
torch.set_num_threads(1)

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024

folder, tiny = sys.argv[1:]
config = hf_sparse.SparseConfig(backend="csr")
transformers.BertModel.from_pretrained(tiny, quantization_config=config)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
model = transformers.BertModel.from_pretrained(folder, quantization_config=config)
print(hf_sparse.runtime.is_runtime(model), memory("VmHWM") - before)
"""


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many bytes of decoded weights are alive whenever one is decoded."""
    import weakref

    from hf_sparse.hf.quantization import load_plan

    alive: list[Any] = []
    most: list[int] = []
    real = load_plan.decode  # type: ignore[attr-defined]

    def decode(*args: Any) -> torch.Tensor:
        weight = real(*args)
        alive.append(weakref.ref(weight.untyped_storage()))
        most.append(sum(storage().nbytes() for storage in alive if storage() is not None))
        return weight

    monkeypatch.setattr(load_plan, "decode", decode)
    return most


@pytest.mark.parametrize("backend", ["auto", "cpu", "csr", "dense"])
@pytest.mark.parametrize("family", ["bert", "t5-gated"])
def test_loaded_into_runtime_form_it_answers_and_comes_back_the_same(
    family: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)
    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path / "cache"))
    model, inputs = sparse(family), batch(family)
    expected, state = answers(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(backend=backend))
    torch.testing.assert_close(answers(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
    if is_runtime(loaded):
        to_dense_runtime(loaded)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert all(own.is_contiguous() for own in loaded.parameters()), "nothing waits any longer"


def test_weights_are_decoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse("bert")
    model.save_pretrained(tmp_path)
    dense = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear))
    most = watch(monkeypatch)
    type(model).from_pretrained(tmp_path)
    plain = max(most)
    gc.collect()
    most.clear()
    loaded = type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(backend="csr"))
    assert is_runtime(loaded)
    assert plain > 0.9 * dense
    assert max(most) < 0.5 * plain


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_peak_of_memory_stays_far_below_the_dense_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    def save(folder: Path, **sizes: Any) -> int:
        shape: dict[str, Any] = {"vocab_size": 16, "num_attention_heads": 2, "max_position_embeddings": 8, **sizes}
        model = BertModel(BertConfig(**shape))
        sparsify(model, SparsityConfig(sparsity=0.95))
        model.save_pretrained(folder)
        return sum(own.nbytes for own in model.parameters())

    save(tmp_path / "tiny", hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    dense = save(tmp_path / "whole", hidden_size=512, num_hidden_layers=12, intermediate_size=2048)
    command = [sys.executable, "-c", WHOLE, str(tmp_path / "whole"), str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    packed, peak = done.stdout.split()[-2:]
    assert packed == "True"
    assert int(peak) < 0.7 * dense, f"{int(peak) / dense:.2f} of the dense model"


def test_layers_that_stay_dense_are_decoded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_sparse.runtime.autotune as timing

    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(SpeedTable, "measure", lambda *_: Measurement(1.0, 2.0, 0.5))
    model, inputs = sparse("bert"), batch("bert")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(backend="auto"))
    assert not is_runtime(loaded)
    assert torch.equal(answers(loaded, inputs), answers(model, inputs))
    assert timing.MARGIN > 0


def test_damage_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from hf_sparse.formats.safetensors_io import read_header

    model = sparse("bert")
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors, (metadata, _) = load_file(file), read_header(file)
    key = "bert.encoder.layer.1.output.dense.weight"
    tensors[key] = tensors[key] + 1
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=key):
        type(model).from_pretrained(tmp_path, quantization_config=SparseConfig(backend="csr"))


def test_what_cannot_be_packed_is_refused_in_words(tmp_path: Path) -> None:
    model = sparse("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=r"model\.float\(\)"):
        type(model).from_pretrained(tmp_path, dtype=torch.float16, quantization_config=SparseConfig(backend="csr"))


@pytest.mark.parametrize(
    ("dtype", "device_map", "able"),
    [
        (torch.float32, None, True),
        (torch.float32, "cpu", True),
        (torch.float32, {"": torch.device("cpu")}, True),
        (torch.float32, {"a": "cpu", "b": "disk"}, False),
        (torch.float32, {"": 0}, False),
        (torch.float32, "auto", False),
        (torch.bfloat16, None, False),
    ],
)
def test_only_what_the_runtime_packs_waits(dtype: torch.dtype, device_map: Any, able: bool) -> None:
    assert can_be_lazy(nn.Linear(2, 2), "layer.weight", dtype, device_map) is able
    assert not can_be_lazy(nn.Linear(2, 2), "layer.bias", dtype, device_map)
    assert not can_be_lazy(nn.Embedding(2, 2), "layer.weight", dtype, device_map)


def test_waiting_weight_takes_no_memory_until_it_arrives() -> None:
    layer, calls = nn.Linear(64, 64), []
    layer.weight = lazy_weight((64, 64), torch.float32, lambda: calls.append(1) or torch.ones(64, 64))  # type: ignore[func-returns-value]
    assert layer.weight.untyped_storage().nbytes() == 4
    assert peek(layer.weight).sum() == 64 * 64
    materialize([layer, nn.ReLU()])
    materialize([layer])
    assert len(calls) == 2
    assert layer.weight.sum() == 64 * 64


def check_brought_back(model: Any, inputs: Any, expected: torch.Tensor, table: SpeedTable) -> None:
    """Check that a model is as it was after timing it was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        to_runtime(model, table=table)
    assert not is_runtime(model)
    assert all(own.requires_grad for own in model.parameters())
    assert torch.equal(answers(model, inputs), expected)


def test_failure_half_way_brings_a_model_back(tmp_path: Path) -> None:
    model, inputs = sparse("bert"), batch("bert")
    model.requires_grad_(True)
    expected, count = answers(model, inputs), []

    def clock(*_: Any) -> Measurement:
        count.append(1)
        if len(count) > 6:
            raise KeyboardInterrupt
        return Measurement(1.0, 0.5, 2.0)

    check_brought_back(model, inputs, expected, SpeedTable(tmp_path / "t.json", clock))


@pytest.mark.skipif(library() is None, reason="the C++ kernels are not built: python -m hf_sparse.kernels.build")
def test_failure_at_the_vocabulary_brings_a_model_back(tmp_path: Path) -> None:
    model = sparse("t5").requires_grad_(True)
    expected = answers(model, batch("t5"))

    def clock(trial: Any, *_: Any) -> Measurement:
        if trial.kind == "dense_few":
            raise KeyboardInterrupt
        return Measurement(1.0, 0.5, 2.0)

    check_brought_back(model, batch("t5"), expected, SpeedTable(tmp_path / "t.json", clock))
