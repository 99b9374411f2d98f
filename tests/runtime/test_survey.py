"""Models that cannot be packed: the message names what the layer is, and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hf_sparse import BackendError, Pruner, SparsityConfig, sparsify, to_dense_runtime, to_runtime
from hf_sparse.profiling.latency_table import Shape, measure
from hf_sparse.runtime import SpeedTable
from tests.helpers import oneshot
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse, table
from tests.helpers.structures import batch


def weight_norm(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def masked(layer: nn.Linear) -> None:
    Pruner(nn.ModuleList([layer]), SparsityConfig(targets="*", sparsity=0.5, schedule="constant")).attach()


def integers(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weight_norm, r"weight_norm: torch\.nn\.utils\.remove_weight_norm\(layer\)"),
        (nn.utils.parametrizations.weight_norm, r"parametrized \(WeightNorm\).*remove_parametrizations"),
        (nn.utils.parametrizations.orthogonal, r"parametrized \(Orthogonal\).*remove_parametrizations"),
        (nn.utils.spectral_norm, r"spectral_norm: torch\.nn\.utils\.remove_spectral_norm\(layer\)"),
        (nn.utils.parametrizations.spectral_norm, r"parametrized \(SpectralNorm\).*remove_parametrizations"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"torch\.nn\.utils\.prune\.remove"),
        (masked, r"still masked.*Pruner\.bake\(\)"),
        (integers, r"quantized \(Linear with torch\.int8\).*dequantize"),
    ],
)
def test_layer_whose_weight_is_computed_is_named_and_what_to_do(change: Callable[[Any], Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    change(model[0])
    with pytest.raises(BackendError, match=message) as caught:
        to_runtime(model, "csr")
    assert "layer '0'" in str(caught.value)
    assert ("quantized" in str(caught.value)) is (change is integers)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "cpu", "cpu-int8", "csr"])
def test_default_dtype_of_torch_does_not_matter(
    default: torch.dtype, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)
    pretend(monkeypatch, int8=None)
    model, inputs = sparse("t5"), batch("t5")
    expected = answers(model, inputs)
    torch.set_default_dtype(default)
    try:
        report = to_runtime(model, backend, table=table(tmp_path))
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.sparse
    found = answers(model, inputs)
    assert (found - expected).norm() < (0.1 if backend == "cpu-int8" else 1e-5) * expected.norm()


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_real_measurements_are_in_float32_on_the_cpu(default: torch.dtype, tmp_path: Path) -> None:
    layer = nn.Linear(32, 32)
    layer.weight.data[:, 4:] = 0.0
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            report = to_runtime(nn.Sequential(layer).eval(), table=SpeedTable(tmp_path / "t.json"), tokens=[3])
            assert min(measure(Shape("attention", 8, 2, 4, 3, 4, 1), [1])[1]) > 0.0
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.layers[0].gains[3] > 0.0


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "csr"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_model_that_was_restored_in_inference_mode_can_train(family: str, backend: str, keep_dense: bool) -> None:
    from hf_sparse.kernels import library_status

    if backend == "cpu" and not library_status().available:
        pytest.skip("the kernels are missing")
    model, inputs = sparse(family), batch(family)
    expected = answers(model, inputs)
    with torch.inference_mode():
        to_runtime(model, backend, keep_dense)
        model(**inputs)
        to_dense_runtime(model)
    assert not any(own.is_inference() for own in model.parameters())
    assert torch.equal(answers(model, inputs), expected)
    model.train()
    model(**inputs).loss.backward()
    assert all(own.grad is not None for own in model.parameters() if own.requires_grad)
    with torch.inference_mode():
        to_runtime(model.eval(), backend, keep_dense)
    to_dense_runtime(model)
    model(**inputs).loss.backward()


def test_model_that_was_loaded_in_inference_mode_is_packed_and_restored(tmp_path: Path) -> None:
    sparse("bert").save_pretrained(tmp_path)
    inputs = batch("bert")
    with torch.inference_mode():
        model = type(sparse("bert")).from_pretrained(tmp_path).eval()
        expected = model(**inputs).logits
        to_runtime(model, "csr")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        to_dense_runtime(model)
        assert torch.equal(model(**inputs).logits, expected)


def test_sparse_layers_of_another_kind_are_named_as_the_reason() -> None:
    model = oneshot.gpt2().float()
    with pytest.raises(BackendError, match="nothing is sparse"):
        to_runtime(model)
    sparsify(model, {"sparsity": 0.9})
    with pytest.raises(
        BackendError, match=r"sparse layers are \d+ Conv1D \(first: 'transformer\.h\.0\..*no kernel packs"
    ):
        to_runtime(model)
