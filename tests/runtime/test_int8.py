"""The int8 runtime form: near the dense outputs, asked for by name alone, and back to the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_sparse.runtime.convert as runtime
from hf_sparse import BackendError, to_dense_runtime, to_runtime
from hf_sparse.kernels import KERNELS, LibraryStatus
from hf_sparse.runtime.packed_linear import PackedLinear
from hf_sparse.runtime.packed_weight import Packed
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse, table
from tests.helpers.structures import FAMILIES, batch


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without them they fall back to torch, and give the same."""
    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)
    pretend(monkeypatch, int8=None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_are_near_those_of_the_dense_model_and_not_the_same(family: str) -> None:
    model, inputs = sparse(family), batch(family)
    expected = answers(model, inputs)
    report = to_runtime(model, "cpu-int8")
    assert report.sparse
    found = answers(model, inputs)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("pattern", ["element", {"name": "block", "rows": 4, "cols": 1}])
@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("family", ["bert", "t5", "t5-gated"])
def test_way_there_and_back_changes_no_bit(family: str, keep_dense: bool, pattern: Any) -> None:
    model = sparse(family, pattern=pattern)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    to_runtime(model, "cpu-int8", keep_dense)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), f"{name} is saved rounded"
    to_dense_runtime(model)
    assert [type(module) for module in model.modules()] == kinds
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
    assert not [name for module in model.modules() for name in vars(module) if "int8" in name]


def test_report_names_int8_and_measures_the_error_of_each_layer() -> None:
    model = sparse("bert")
    layer = "bert.encoder.layer.0"
    weight = model.get_submodule(f"{layer}.output.dense").weight.detach().clone()
    report = to_runtime(model, "cpu-int8")
    found = {one.name: one for one in report.layers}
    assert found[f"{layer}.attention.self.query"].kernel == "int8_qkv"
    assert found[f"{layer}.attention.output.dense"].kernel == "int8_linear"
    assert found[f"{layer}.output.dense"].kernel == "int8_ffn"
    assert "not exact" in str(report)
    assert all(one.error is not None and 1e-4 < one.error < 0.05 for one in report.sparse)
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0))
    packed: Any = model.get_submodule(f"{layer}.output.dense").packed
    wanted = F.linear(x, weight)
    error = float((packed.multiply(x, None) - wanted).norm() / wanted.norm())
    assert found[f"{layer}.output.dense"].error == pytest.approx(error, rel=1e-5)
    assert report.backend == report.to_dict()["backend"] == "cpu-int8"


def test_report_counts_the_exact_weights_that_are_kept() -> None:
    model = sparse("bert")
    report = to_runtime(model, "cpu-int8")
    held = {id(part): part for part in model.buffers() if part.dtype != torch.int64}
    packed = sum(part.nbytes for part in held.values())
    assert sum(one.bytes for one in report.sparse) == pytest.approx(packed, abs=2 * len(report.sparse))


def test_auto_never_chooses_it_however_slow_the_exact_kernels_are(tmp_path: Any) -> None:
    times = table(tmp_path, sparse_attention=1e-9, sparse_linear=1e-9, sparse_ffn=1e-9)
    model = sparse("bert")
    report = to_runtime(model, table=times)
    assert report.sparse
    assert all(one.error is None and "int8" not in one.kernel for one in report.layers)
    assert all(module.kernel == "cpu" for module in model.modules() if isinstance(module, PackedLinear))
    assert not any("int8" in trial.kind for trial in times.clock.asked)  # type: ignore[attr-defined]


def test_processors_that_cannot_refuse_in_words_and_leave_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, int8="no AVX2 in this test")
    model = sparse("bert")
    with pytest.raises(BackendError, match="no AVX2 in this test"):
        to_runtime(model, "cpu-int8")
    assert not runtime.is_runtime(model)


def test_weights_that_are_not_finite_are_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(40, 24)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(24, 40) < 0.2)
        model[0].weight[3, 3] = float("inf")
    with pytest.raises(BackendError, match="infinities"):
        to_runtime(model, "cpu-int8")
    assert type(model[0]) is nn.Linear


def test_biases_changed_in_place_and_copies_of_the_model_count() -> None:
    model, inputs = sparse("bert"), batch("bert")
    to_runtime(model, "cpu-int8")
    twin, before = copy.deepcopy(model), answers(model, inputs)
    assert torch.equal(answers(twin, inputs), before)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias.add_(1)
    assert not torch.equal(answers(model, inputs), before)
    assert torch.equal(answers(twin, inputs), before)


def test_compiler_sees_through() -> None:
    torch._dynamo.reset()
    model: Any = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 40)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.2)
        to_runtime(model, "cpu-int8")
        x = torch.randn(3, 20, 40)
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x[:, :7]), model(x[:, :7]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "t5-gated"])
def test_compiler_sees_through_whole_models(family: str) -> None:
    torch._dynamo.reset()
    model, inputs = sparse(family), batch(family)
    to_runtime(model, "cpu-int8")
    expected = answers(model, inputs)
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(answers(compiled, inputs), expected, atol=5e-3, rtol=5e-2)


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5-gated"])
def test_every_product_of_packed_layers_is_in_int8(family: str) -> None:
    """The exact weights lie beside the rounded ones, and nothing may multiply by them by mistake."""
    model, inputs = sparse(family), batch(family)
    to_runtime(model, "cpu-int8")
    called: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        answers(model, inputs)
    own = {name.split(".")[1] for name in called if name.startswith("hf_sparse.")}
    own.discard("dense_linear")  # the vocabulary's, which is dense
    assert own
    assert all(name.startswith("int8") for name in own), own


def test_rows_are_chosen_for_the_int8_products() -> None:
    weight = torch.zeros(64, 64)
    weight[::4] = 1.0
    assert KERNELS["int8"].choose_rows(weight) == 1
    assert KERNELS["int8"].choose_rows(torch.ones(64, 64)) == Packed.of(torch.ones(64, 64), "int8").rows == 4
