"""The product with the vocabulary laid out by columns: the same numbers, the same model, back the same bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.runtime import vocabulary
from hf_sparse.runtime.timing import Race, Run, SpeedTable, Trial
from tests.runtime.models import answers, sparse, table
from tests.structures import batch


def test_layout_changes_no_number_and_stays_tied() -> None:
    model, inputs = sparse("t5"), batch("t5")
    expected, before = answers(model, inputs), model.lm_head.weight.detach().clone()
    assert model.lm_head.weight is model.shared.weight
    report = to_runtime(model, "cpu")
    weight = model.lm_head.weight
    assert weight is model.shared.weight
    assert not weight.is_contiguous()
    assert weight.t().is_contiguous()
    assert torch.equal(weight, before)
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    said = next(layer for layer in report.layers if layer.name == "lm_head")
    assert said.kernel == "by_columns"
    assert "by columns" in (said.reason or "")
    assert "by columns" in str(report)
    assert said.bytes == said.dense_bytes
    to_dense_runtime(model)
    assert model.lm_head.weight is weight is model.shared.weight
    assert weight.is_contiguous()
    assert torch.equal(weight, before)


def test_generated_tokens_are_the_same_and_copies_work() -> None:
    model, inputs = sparse("t5"), batch("t5")
    ids = {"input_ids": inputs["input_ids"], "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**ids)
    to_runtime(model, "cpu")
    assert torch.equal(model.generate(**ids), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**ids), expected)
    to_dense_runtime(twin)
    assert twin.lm_head.weight.is_contiguous()
    assert not model.lm_head.weight.is_contiguous()


@pytest.mark.parametrize("ours", [True, False])
def test_saved_model_is_the_model(tmp_path: Path, ours: bool) -> None:
    model = sparse("t5")
    if not ours:
        model = model.dequantize()  # saved by transformers alone
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    to_runtime(model, "cpu")
    state = model.state_dict()
    assert state["lm_head.weight"].is_contiguous()
    assert state["lm_head.weight"].data_ptr() == state["shared.weight"].data_ptr()
    model.save_pretrained(tmp_path)
    to_dense_runtime(model)
    assert model.state_dict()["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


class Timed:
    """A clock that says what each number of tokens is given here, by columns; kernels take half of the dense time."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds

    def __call__(self, trial: Trial, dense: Run, packed: Run) -> Race:
        if trial.kind != vocabulary.KERNEL:
            return Race(1.0, 0.5, 2.0)
        torch.testing.assert_close(dense(), packed())
        return Race(1.0, self.seconds[trial.tokens], 1.0 / self.seconds[trial.tokens])


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
    assert (said.kernel == "by_columns") is changed
    assert model.lm_head.weight.is_contiguous() is not changed
    assert said.gains[1] == pytest.approx(1 / seconds[1])


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_models_that_do_not_generate_are_left_alone(family: str, tmp_path: Path) -> None:
    model = sparse(family)
    assert vocabulary.vocabulary_of(model) is None
    report = to_runtime(model, "auto", table=table(tmp_path))
    assert all(layer.kernel != "by_columns" for layer in report.layers)


def test_other_layouts_and_backends_are_left_alone(tmp_path: Path) -> None:
    model = sparse("t5")
    for backend in ("csr", "dense"):
        to_runtime(model, backend)
        assert model.lm_head.weight.is_contiguous()
        if backend == "csr":
            to_dense_runtime(model)
    model.lm_head.weight.data = model.lm_head.weight.detach().t().contiguous().t()
    assert vocabulary.vocabulary_of(model) is None  # so that the way back would not change what the user made
