"""What a model in runtime form refuses, it refuses before anything has changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import BackendError, to_dense_runtime, to_runtime
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

CASTS: dict[str, Callable[[Any], Any]] = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to meta": lambda model: model.to("meta"),
}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return all(now[name].dtype == value.dtype and torch.equal(now[name], value) for name, value in state.items())


@pytest.mark.parametrize("part", ["", "bert", "bert.encoder.layer.1", "bert.encoder.layer.1.attention.self"])
@pytest.mark.parametrize("cast", list(CASTS))
def test_refused_cast_changes_nothing(cast: str, part: str) -> None:
    model, inputs = sparse("bert"), batch("bert")
    to_runtime(model, "csr")
    before, expected = state_of(model), answers(model, inputs)
    with pytest.raises(BackendError, match="to_dense_runtime"):
        CASTS[cast](model.get_submodule(part))
    assert same(model, before)
    assert torch.equal(answers(model, inputs), expected)


@pytest.mark.parametrize("family", ["distilbert", "t5"])
def test_refused_cast_changes_nothing_in_other_families(family: str) -> None:
    model = sparse(family)
    to_runtime(model, "csr")
    before = state_of(model)
    with pytest.raises(BackendError, match=r"requested torch\.bfloat16"):
        model.bfloat16()
    assert same(model, before)


def test_refused_load_copies_nothing() -> None:
    model = sparse("bert")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    to_runtime(model, "csr")
    before = state_of(model)
    for strict in (True, False):
        with pytest.raises(BackendError, match="to_dense_runtime"):
            model.load_state_dict(state, strict=strict)
        assert same(model, before)
    layer = "bert.encoder.layer.0"
    part = {name.removeprefix(f"{layer}."): value for name, value in state.items() if name.startswith(layer)}
    with pytest.raises(BackendError, match=r"attention\.self\.query\.weight"):
        model.get_submodule(layer).load_state_dict(part)
    assert same(model, before)


@pytest.mark.parametrize("value", [torch.zeros(2, 2), torch.nn.Parameter(torch.zeros(2, 2))])
def test_packed_weight_cannot_be_set(value: torch.Tensor) -> None:
    model = sparse("bert")
    to_runtime(model, "csr")
    before = state_of(model)
    with pytest.raises(BackendError, match="`weight` of a layer in runtime form is packed, and cannot be set"):
        model.bert.encoder.layer[0].output.dense.weight = value
    assert same(model, before)


def test_what_reaches_no_packed_layer_is_allowed() -> None:
    model, inputs = sparse("bert"), batch("bert")
    to_runtime(model, "csr")
    name = "bert.embeddings.word_embeddings.weight"
    embeddings = model.state_dict()[name] * 1.5
    model.load_state_dict({name: embeddings}, strict=False)
    assert torch.equal(model.get_parameter(name), embeddings)
    expected = answers(model, inputs)
    for unchanged in (model.float(), model.to("cpu"), model.to(torch.float32), model.share_memory()):
        assert torch.equal(answers(unchanged, inputs), expected)
    model.classifier.to(torch.float64)
    assert model.classifier.weight.dtype == torch.float64


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_move_that_changes_nothing_is_allowed_under_any_default_dtype(default: torch.dtype) -> None:
    model = sparse("bert")
    to_runtime(model, "csr")
    torch.set_default_dtype(default)
    try:
        model.to("cpu")
        with pytest.raises(BackendError, match="requested"):
            model.to(default)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
def test_copies_refuse_for_themselves_and_can_be_restored(way: str) -> None:
    model = sparse("bert").requires_grad_(True)
    to_runtime(model, "csr")
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))  # noqa: S301  made here
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    to_dense_runtime(model)
    model.double()
    before = state_of(copied)
    with pytest.raises(BackendError, match="to_dense_runtime"):
        copied.double()
    assert same(copied, before)
    to_dense_runtime(copied)
    assert all(own.requires_grad for own in copied.parameters())
    assert copied.double().classifier.weight.dtype == torch.float64


def test_model_is_freed_without_the_garbage_collector() -> None:
    model = sparse("bert")
    to_runtime(model, "csr")
    layer = weakref.ref(model.bert.encoder.layer[0].intermediate.dense)
    gc.collect()
    gc.disable()
    try:
        dense = sparse("bert")
        alive = weakref.ref(dense.bert.encoder.layer[0].intermediate.dense)
        del dense
        freed = alive() is None  # does transformers make a circle of its own?
        del model
        assert layer() is None or not freed
    finally:
        gc.enable()
