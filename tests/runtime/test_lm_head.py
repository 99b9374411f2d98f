"""The product with the lm_head, read by the own kernel: the same numbers, the same model, back what it was."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.kernels import LibraryStatus
from hf_sparse.profiling.timer import Run
from hf_sparse.runtime import lm_head
from hf_sparse.runtime.autotune import Measurement, SpeedTable, Trial
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse, table
from tests.helpers.structures import batch


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None)


def test_other_kernel_changes_no_number_and_the_weight_stays_tied() -> None:
    model, inputs = sparse("t5"), batch("t5")
    expected, before = answers(model, inputs), model.lm_head.weight.detach().clone()
    weight, state = model.lm_head.weight, list(model.state_dict())
    assert weight is model.shared.weight
    report = to_runtime(model, "cpu")
    assert model.lm_head.weight is weight is model.shared.weight
    assert torch.equal(weight, before)
    assert list(model.state_dict()) == state
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    one = torch.randn(1, 1, model.lm_head.in_features)
    torch.testing.assert_close(model.lm_head(one), nn.functional.linear(one, weight), atol=1e-5, rtol=1e-5)
    said = next(layer for layer in report.layers if layer.name == "lm_head")
    assert said.kernel == "dense_few"
    assert "a few tokens" in (said.reason or "")
    assert "a few tokens" in str(report)
    assert said.bytes == said.dense_bytes
    to_dense_runtime(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is weight is model.shared.weight


def test_generated_tokens_are_the_same_and_copies_work() -> None:
    model, inputs = sparse("t5"), batch("t5")
    ids = {"input_ids": inputs["input_ids"], "max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
    expected = model.generate(**ids)
    to_runtime(model, "cpu")
    assert torch.equal(model.generate(**ids), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        assert type(twin.lm_head) is type(model.lm_head)
        assert torch.equal(twin.generate(**ids), expected)
        to_dense_runtime(twin)
        assert type(twin.lm_head) is nn.Linear
        assert type(model.lm_head) is not nn.Linear


def test_operator_is_called_and_compilers_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = nn.Linear(24, 40, bias=False).requires_grad_(False)
    x = torch.randn(1, 24)
    expected = layer(x)
    lm_head.use_few_token_kernel(layer)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    for strict in (False, True):
        tokens = torch.export.Dim("tokens", min=2, max=64)
        exported = torch.export.export(layer, (torch.randn(12, 24),), dynamic_shapes=({0: tokens},), strict=strict)
        assert "hf_sparse.dense_linear.default" in [str(node.target) for node in exported.graph.nodes]
        for count in (3, 50):
            some = torch.randn(count, 24)
            torch.testing.assert_close(exported.module()(some), layer(some))
    asked: list[int] = []
    monkeypatch.setattr(lm_head, "dense_linear", lambda x, weight, bias: asked.append(1))
    layer(x)
    assert asked == [1]


def test_gradients_pass_where_they_are_asked_for() -> None:
    layer: Any = nn.Linear(6, 5).requires_grad_(False)
    lm_head.use_few_token_kernel(layer)
    x = torch.randn(2, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 6))


def test_saved_model_is_the_model(tmp_path: Path) -> None:
    model = sparse("t5").dequantize()  # saved by transformers alone
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    to_runtime(model, "cpu")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


class Timed:
    """A clock that says what each number of tokens is given here; sparse kernels take half of the dense time."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds

    def __call__(self, trial: Trial, dense: Run, packed: Run) -> Measurement:
        if trial.kind != lm_head.KERNEL:
            return Measurement(1.0, 0.5, 2.0)
        torch.testing.assert_close(dense(), packed())
        return Measurement(1.0, self.seconds[trial.tokens], 1.0 / self.seconds[trial.tokens])


@pytest.mark.parametrize(
    ("seconds", "changed"),
    [
        ({1: 0.5, 16: 1.0, 128: 1.02}, True),
        ({1: 0.99, 16: 0.5, 128: 0.5}, False),
        ({1: 0.5, 16: 1.0, 128: 1.1}, False),
    ],
)
def test_auto_changes_it_where_one_token_gains_and_none_loses(
    tmp_path: Path, seconds: dict[int, float], changed: bool
) -> None:
    model = sparse("t5")
    report = to_runtime(model, "auto", table=SpeedTable(tmp_path / "runtime.json", Timed(seconds)))
    said = next(layer for layer in report.layers if layer.name == "lm_head")
    assert (said.kernel == "dense_few") is changed
    assert (type(model.lm_head) is nn.Linear) is not changed
    assert said.gains[1] == pytest.approx(1 / seconds[1])


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_models_that_do_not_generate_are_left_alone(family: str, tmp_path: Path) -> None:
    model = sparse(family)
    assert lm_head.lm_head_of(model) is None
    report = to_runtime(model, "auto", table=table(tmp_path))
    assert all(layer.kernel != "dense_few" for layer in report.layers)


def test_other_layouts_backends_and_machines_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = sparse("t5")
    for backend in ("csr", "dense"):
        to_runtime(model, backend)
        assert type(model.lm_head) is nn.Linear
        if backend == "csr":
            to_dense_runtime(model)
    model.lm_head.weight.data = model.lm_head.weight.detach().t().contiguous().t()
    assert lm_head.lm_head_of(model) is None
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(False, None, None, "there are none"))
    pretend(monkeypatch, cpu="there are none", dense_few="there are none")
    model = sparse("t5")
    report = to_runtime(model, "auto", table=table(tmp_path))
    assert report.sparse
    assert type(model.lm_head) is nn.Linear
