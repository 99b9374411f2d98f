"""The names of sparse weights are remembered over several prunings, in parts, and in copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import hf_sparse
from hf_sparse import RecipeError, SparsityConfig
from hf_sparse.modeling import model_state
from hf_sparse.modeling.model_state import (
    Attribute,
    is_marked,
    mark_sparse_weights,
    sparse_weights,
    unmark_sparse_weights,
)


def nested() -> Any:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_names_add_up_in_the_order_of_the_model_each_once() -> None:
    model = nested()
    mark_sparse_weights(model, ["1.1.weight"])
    mark_sparse_weights(model, ["1.0.weight", "1.1.weight"])
    mark_sparse_weights(model, ["0.weight"])
    assert sparse_weights(model) == ("0.weight", "1.0.weight", "1.1.weight")


def test_names_of_a_part_belong_to_the_whole_and_to_copies() -> None:
    model = nested()
    mark_sparse_weights(model[1], ["1.weight"])
    assert is_marked(model)
    assert sparse_weights(copy.deepcopy(model)) == ("1.1.weight",)
    mark_sparse_weights(model, ["0.weight"])
    assert sparse_weights(model) == ("0.weight", "1.1.weight")
    assert sparse_weights(model[1]) == ("1.weight",)
    unmark_sparse_weights(model)
    assert not is_marked(model)
    assert not is_marked(model[1])


def test_name_of_a_layer_that_is_gone_is_gone() -> None:
    model = nested()
    mark_sparse_weights(model, ["0.weight", "1.1.weight"])
    del model[1][1]
    assert sparse_weights(model) == ("0.weight",)


def test_table_lists_every_attribute() -> None:
    names = [value.name for value in vars(model_state).values() if isinstance(value, Attribute)]
    assert len(names) == len(set(names)) == 9
    assert all(f"| `{name}` |" in (model_state.__doc__ or "") for name in names)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: hf_sparse.sparsify(model, SparsityConfig(sparsity=0.5)),
        lambda model: hf_sparse.sparsify(model, SparsityConfig(sparsity=0.5, pattern="head")),
        lambda model: hf_sparse.Pruner(model, SparsityConfig(sparsity=0.5)),
        lambda model: hf_sparse.head_importance(model, []),
        *(hf_sparse.summarize, hf_sparse.compact, hf_sparse.fill, hf_sparse.merged_update),
        *(hf_sparse.to_runtime, hf_sparse.to_dense_runtime),
    ],
)
def test_what_is_not_a_model_is_refused_by_name(call: Callable[[Any], Any]) -> None:
    for model in ("bert-base-uncased", nn.Linear, None):
        with pytest.raises(RecipeError, match=r"`model` must be a torch\.nn\.Module, got ('bert|<class|None)"):
            call(model)
