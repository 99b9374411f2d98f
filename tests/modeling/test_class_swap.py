"""Swapped classes: behavior changes, everything else stays, copies keep it, and `restore` leaves no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse.modeling.class_swap import Swapped, plain_class_of, restore, swap_class, swaps_of


class Doubled(Swapped):
    instance_attributes = ("note",)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(x)  # type: ignore[misc]
        return out


class Shifted(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 1 + super().forward(x)  # type: ignore[misc]
        return out


class Negated(Swapped):
    def swapped_call(self: Any, x: Tensor) -> Tensor:
        out: Tensor = -getattr(self.plain_class, self.method)(self, x)
        return out


class Chunked(nn.Linear):
    def chunk(self, x: Tensor) -> Tensor:
        return self.forward(x)


def layer() -> Any:
    linear = nn.Linear(2, 2, bias=False)
    linear.weight = nn.Parameter(torch.eye(2))
    return linear


X = torch.tensor([[1.0, 3.0]])


def test_swaps_stack_and_are_undone_in_order() -> None:
    module: Any = nn.Sequential(layer())
    weight = module[0].weight
    swap_class(module[0], Doubled)
    swap_class(module[0], Shifted)
    module[0].note = "kept until then"
    assert torch.equal(module(X), 2 * X + 1)
    assert list(swaps_of(module[0])) == [Shifted, Doubled]
    assert plain_class_of(module[0]) is nn.Linear
    assert isinstance(module[0], nn.Linear)
    restore(module, Doubled)
    assert torch.equal(module(X), 2 * X + 1), "it is not the last swap"
    restore(module, Shifted)
    assert torch.equal(module(X), 2 * X)
    restore(module, Doubled)
    assert type(module[0]) is nn.Linear
    assert module[0].weight is weight
    assert "note" not in vars(module[0])


def test_restore_of_a_base_undoes_all_below_it() -> None:
    module = layer()
    swap_class(module, Doubled)
    swap_class(module, Shifted)
    restore(module, Swapped)
    assert type(module) is nn.Linear


def test_second_swap_to_the_same_mixin_does_nothing() -> None:
    module = layer()
    swap_class(module, Doubled)
    swap_class(module, Doubled)
    assert torch.equal(module(X), 2 * X)


def test_mixin_can_replace_a_method_by_name() -> None:
    module: Any = Chunked(2, 2, bias=False)
    module.weight = nn.Parameter(torch.eye(2))
    swap_class(module, Negated, "chunk")
    assert torch.equal(module.chunk(X), -X)
    assert torch.equal(module(X), X)
    assert torch.equal(pickle.loads(pickle.dumps(module)).chunk(X), -X)  # noqa: S301  made here


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle"])
def test_copies_keep_the_swap_and_share_the_class(way: str) -> None:
    module = layer()
    swap_class(module, Doubled)
    swap_class(module, Shifted)
    copied = {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda each: pickle.loads(pickle.dumps(each)),  # noqa: S301  made here
    }[way](module)
    assert type(copied) is type(module)
    assert torch.equal(copied(X), 2 * X + 1)
    restore(copied, Swapped)
    assert type(copied) is nn.Linear
    assert type(module) is not nn.Linear


def test_class_of_two_modules_is_one_so_that_compilers_see_one_kind() -> None:
    one, other = layer(), layer()
    swap_class(one, Doubled)
    swap_class(other, Doubled)
    assert type(one) is type(other)
