"""Query, key and value as one matmul: each layer returns the product with its input as it is at that time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import to_runtime
from hf_sparse.runtime.joint import Joint
from hf_sparse.runtime.packed_linear import PackedLinear, become_packed
from hf_sparse.runtime.packed_weight import Packed
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse
from tests.helpers.structures import batch

MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "plain": contextlib.nullcontext,
}


def layers(count: int = 3) -> tuple[list[Any], list[Tensor]]:
    """Return layers that are packed together, and their dense weights."""
    made = [nn.Linear(8, 4).requires_grad_(False).eval() for _ in range(count)]
    weights = [layer.weight.clone() for layer in made]
    become_packed(made, Packed.of(torch.cat(weights), "cpu"), keep_dense=False)
    return made, weights


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the matmuls."""
    made: list[int] = []
    real = Packed.multiply
    monkeypatch.setattr(Packed, "multiply", lambda *given: made.append(1) or real(*given))  # type: ignore[func-returns-value]
    return made


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("mode", list(MODES))
def test_input_that_is_changed_in_place_is_multiplied_anew(mode: str, inside: bool) -> None:
    (query, key, value), weights = layers()
    x = torch.randn(2, 8)
    with MODES[mode]():
        x = x.clone() if inside else x
        for number, layer in enumerate((query, key, value)):
            expected = nn.functional.linear(x, weights[number], layer.bias)
            torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
            x.mul_(2)


def test_compiled_code_sees_a_changed_input() -> None:
    (query, key, _), weights = layers()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        first = query(x)
        x.mul_(2)
        return first, key(x)

    torch._dynamo.reset()
    x = torch.randn(2, 8)
    expected = nn.functional.linear(x, weights[0], query.bias), nn.functional.linear(2 * x, weights[1], key.bias)
    with torch.no_grad():
        found = torch.compile(run, backend="aot_eager")(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5"])
def test_known_attention_computes_one_matmul_for_three_layers(
    family: str, mode: str, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_sparse.runtime.convert as runtime
    from hf_sparse.kernels import LibraryStatus

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)
    model, inputs = sparse(family), batch(family)
    model.set_attn_implementation("eager")  # so that the operator of all heads does not compute it
    expected = answers(model, inputs)
    to_runtime(model, "cpu")
    products.clear()
    with MODES[mode]():
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
    joint = sum(isinstance(module, PackedLinear) and module.joint is not None for module in model.modules()) // 3
    single = sum(isinstance(module, PackedLinear) and module.joint is None for module in model.modules())
    fused = {"bert": 4, "distilbert": 4, "t5": 8}[family]  # feed-forward layers, in an operator of their own
    assert len(products) == joint + single - fused


def test_error_inside_an_attention_leaves_nothing_behind() -> None:
    (query, key, _), weights = layers()
    joint: Joint = query.joint
    x = torch.randn(2, 8)
    with torch.inference_mode():
        x = x.clone()
        held = joint.open()
        try:
            query(x)
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            held.clear()
        x.mul_(2)
        torch.testing.assert_close(key(x), nn.functional.linear(x, weights[1], key.bias), atol=1e-6, rtol=1e-6)


def test_threads_do_not_see_the_scope_of_another() -> None:
    (query, key, _), weights = layers()
    x, results = torch.randn(2, 8), list[Tensor]()
    query.joint.open()
    query(x)

    def other() -> None:
        with torch.inference_mode():
            results.append(key(x))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], nn.functional.linear(x, weights[1], key.bias), atol=1e-6, rtol=1e-6)


def test_attention_scope_ends_with_the_call() -> None:
    model, inputs = sparse("t5"), batch("t5")
    to_runtime(model, "cpu")
    core: Any = model.encoder.block[0].layer[0].SelfAttention
    with torch.inference_mode():
        model(**inputs)
        assert not core.q.joint.local.__dict__
        with pytest.raises(RuntimeError):
            core(torch.randn(1, 3, 5))  # of the wrong width
    assert not core.q.joint.local.__dict__
