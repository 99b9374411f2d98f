"""Ctrl-C at any line of packing or restoring leaves every layer with its weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse.runtime
from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.runtime import is_runtime, packed_linear
from hf_sparse.runtime.packed_linear import become_dense, become_packed
from hf_sparse.runtime.packed_weight import Packed
from tests.helpers.runtime_models import sparse

RUNTIME = str(Path(hf_sparse.runtime.__file__).parent)


def interrupted(call: Callable[[], Any], number: int, where: str) -> bool:
    """Raise KeyboardInterrupt before the line of this number below a path; return whether there was such a line."""
    seen = -1

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(where):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def assert_whole(layers: list[Any], states: list[dict[str, Tensor]], x: Tensor, expected: list[Tensor]) -> None:
    for layer, state, out in zip(layers, states, expected, strict=True):
        assert list(layer.state_dict()) == list(state)
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_dense", [False, True], ids=["packed alone", "dense kept"])
@pytest.mark.parametrize("count", [1, 3], ids=["one layer", "joint layers"])
@pytest.mark.parametrize("back", [False, True], ids=["packing", "restoring"])
def test_layers_are_whole_after_an_interruption_at_any_line(back: bool, count: int, keep_dense: bool) -> None:
    layers: list[Any] = [nn.Linear(8, 4, bias=True).eval() for _ in range(count)]
    x = torch.randn(2, 8)
    with torch.no_grad():
        for layer in layers:
            layer.weight[:, ::2] = 0
            layer.weight.mark = "kept"
        expected = [layer(x) for layer in layers]
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    packed = Packed.of(torch.cat([layer.weight.detach() for layer in layers]), "csr")
    number = 0
    while True:
        if back:
            become_packed(layers, packed, keep_dense)
        action = become_dense if back else lambda which: become_packed(which, packed, keep_dense)
        hit = interrupted(lambda: action(layers), number, packed_linear.__file__)  # noqa: B023  called at once
        assert_whole(layers, states, x, expected)
        for layer in layers:
            if type(layer) is nn.Linear and not back:
                assert "packed_values" not in layer._buffers, f"left after an interruption at line {number}"
        if any(isinstance(layer, packed_linear.PackedLinear) for layer in layers):
            become_dense(layers)
        assert_whole(layers, states, x, expected)
        assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in layers)
        assert all(layer.weight.mark == "kept" for layer in layers)
        number += 1
        if not hit:
            break
    assert number > 10, "no line was interrupted"


@pytest.mark.parametrize("step", range(4))
def test_a_model_is_whole_after_an_interrupted_conversion(step: int) -> None:
    model = sparse("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(step * 20, 100_000, 173):
        hit = interrupted(lambda: to_runtime(model, "csr"), number, RUNTIME)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
        if is_runtime(model):
            to_dense_runtime(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        if not hit:
            return
