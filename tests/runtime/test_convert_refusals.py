"""What `to_runtime` refuses, and what a model in runtime form refuses, with the way out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import (
    BackendError,
    Pruner,
    RecipeError,
    SparseConfig,
    SparsityConfig,
    compact,
    sparsify,
    to_dense_runtime,
    to_runtime,
)
from hf_sparse.pruning.head_importance import head_importance
from tests.helpers.kernels import built_for_test, pretend
from tests.helpers.runtime_models import sparse, table
from tests.helpers.structures import batch
from tests.runtime.converted import sparse_linear


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for_test(monkeypatch, "cpu", "dense_few")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_training_is_refused_with_the_way_out() -> None:
    model, inputs = sparse("bert"), batch("bert")
    to_runtime(model, "cpu")
    model.train()
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model(**inputs)


def test_gradients_are_refused() -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    x = torch.randn(1, 4, 16, requires_grad=True)
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model(inputs_embeds=x)
    assert not model(input_ids=batch("bert")["input_ids"]).logits.requires_grad, "inference needs no no_grad()"


@pytest.mark.parametrize("change", ["half", "meta", "bfloat16"])
def test_casts_and_moves_are_refused(change: str) -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model.to({"half": torch.float16, "bfloat16": torch.bfloat16}.get(change, change))


def test_loading_weights_into_packed_layers_is_refused() -> None:
    model = sparse("bert")
    state = copy.deepcopy(model.state_dict())
    to_runtime(model, "cpu")
    with pytest.raises(RuntimeError, match="to_dense_runtime"):
        model.load_state_dict(state)


def masked() -> Any:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    Pruner(model, SparsityConfig(targets="*", sparsity=0.5, schedule="constant")).attach()
    return model


def meta() -> Any:
    return nn.Sequential(nn.Linear(16, 16, device="meta"))


def adapters() -> Any:
    return nn.ModuleDict({"q": nn.ModuleDict({"base_layer": nn.Linear(4, 4)})})


def quantized() -> Any:
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (masked, "bake"),
        (meta, "offloaded"),
        (adapters, "adapters"),
        (quantized, "quantized"),
        (lambda: nn.Sequential(sparse_linear()).half(), "float32"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "nothing is sparse"),
        (lambda: nn.Sequential(nn.ReLU()), "no linear layer"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_with_a_reason(make: Any, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        to_runtime(make(), "cpu")


def test_runtime_form_of_a_runtime_form_is_refused() -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    with pytest.raises(BackendError, match="already"):
        to_runtime(model, "cpu")


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(
    "change",
    [
        compact,
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5, pattern="head")),
        lambda model: sparsify(
            model, SparsityConfig(sparsity=0.5, pattern="head", scorer="head_importance"), [batch("bert")]
        ),
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5, pattern="head+neuron")),
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5)),
        lambda model: sparsify(model, SparsityConfig(sparsity=0.5, targets="*")),
        lambda model: Pruner(model, SparsityConfig(sparsity=0.5)).attach(),
        lambda model: head_importance(model, [batch("bert")]),
    ],
    ids=["compact", "heads", "head importance", "head+neuron", "default", "all", "Pruner", "importance"],
)
def test_pruning_and_cutting_a_runtime_model_names_the_way_back(change: Any, some: bool) -> None:
    model = sparse("bert")
    if some:
        with torch.no_grad():
            model.bert.encoder.layer[1].intermediate.dense.weight.normal_()
    to_runtime(model, "cpu")
    with pytest.raises(BackendError, match=r"'bert.encoder.layer.0.attention.self.query' .*to_dense_runtime\(model\)"):
        change(model)
    to_dense_runtime(model)
    compact(model)


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(
        BackendError,
        match="'auto', 'cpu', 'cpu-int8', 'csr', 'bitmask', 'bitmask-int8', 'bitmask-int4', 'dense', got 'gpu'",
    ):
        to_runtime(sparse("bert"), "gpu")


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(False, None, None, "build them so"))
    pretend(monkeypatch, cpu="build them so", dense_few="build them so")
    with pytest.raises(BackendError, match="build them so"):
        to_runtime(sparse("bert"), "cpu")
    report = to_runtime(sparse("bert"), table=table(tmp_path))
    assert {layer.kernel for layer in report.sparse} == {"csr"}


def test_config_refuses_unknown_backends_and_two_wishes() -> None:
    with pytest.raises(
        RecipeError, match="'auto', 'cpu', 'cpu-int8', 'csr', 'bitmask', 'bitmask-int8', 'bitmask-int4', 'dense'"
    ):
        SparseConfig(backend="gpu")
    with pytest.raises(RecipeError, match="one of the two"):
        SparseConfig(backend="auto", quantization_config={"load_in_8bit": True})
