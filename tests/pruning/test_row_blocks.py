"""Compaction of models that were pruned in blocks of rows: neurons leave in whole blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_sparse import SparsityConfig, compact, sparsify
from hf_sparse.kernels import KERNELS
from hf_sparse.pruning.row_blocks import height_of
from tests.helpers import decoders
from tests.helpers.runtime_models import answers
from tests.helpers.structures import batch, build

BLOCKS = {"name": "block", "rows": 4, "cols": 1}


FIRST = {
    "bert": ["*intermediate.dense"],
    "llama": ["*gate_proj", "*up_proj"],
    "gpt2": ["*c_fc"],
    "phi3": ["*gate_up_proj"],
}
"""Layers before the neurons. Those behind stay dense: of 4 blocks in a column, all are often pruned."""


def in_blocks(pattern: Any = BLOCKS) -> Any:
    """Return a BERT whose zeros are in blocks of 4 x 1."""
    model = build("bert", intermediate_size=32)
    sparsify(model, SparsityConfig(sparsity=0.6, pattern=pattern, targets=FIRST["bert"]))
    return model.eval()


def unread(model: Any, neurons: list[int], layer: int = 0) -> None:
    """Let nothing read these neurons, as pruning does by chance."""
    with torch.no_grad():
        model.bert.encoder.layer[layer].output.dense.weight[:, neurons] = 0


def widths(model: Any) -> list[int]:
    return [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]


def test_single_neurons_stay_for_their_block_and_whole_blocks_leave(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = in_blocks(), batch("bert")
    unread(model, [0, 5, 12, 13, 14, 15])
    expected = answers(model, inputs)
    up = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    compact(model)
    assert widths(model) == [28, 32]
    left = model.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(left, torch.cat([up[:12], up[16:]]))
    assert KERNELS["cpu"].choose_rows(left) >= 4
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    messages = [record.message for record in caplog.records if "compact()" in record.message]
    assert len(messages) == 1
    assert "2 neurons that contribute nothing stay, because others in their block of 4 rows do" in messages[0]


def test_constants_of_neurons_that_stay_count_once() -> None:
    model, inputs = in_blocks(), batch("bert")
    block = model.bert.encoder.layer[0]
    with torch.no_grad():  # one row of a block that others need: a constant, which the bias of the next layer takes
        block.intermediate.dense.weight[9] = 0
        block.intermediate.dense.bias[9] = 3.0
        block.output.dense.weight[:, 9] = 1.0
    unread(model, [4, 5, 6, 7])
    expected = answers(model, inputs)
    compact(model)
    assert widths(model) == [28, 32]
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_many_single_neurons_leave_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = in_blocks(), batch("bert")
    unread(model, [number for number in range(32) if number % 4 < 2])
    expected = answers(model, inputs)
    compact(model)
    assert widths(model) == [16, 32]
    assert "16 neurons left from blocks of 4 rows in which others stay" in caplog.text
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["element", {"name": "block", "rows": 1, "cols": 4}])
def test_without_blocks_of_rows_every_neuron_leaves(pattern: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = in_blocks(pattern)
    unread(model, [0, 5], layer=1)
    compact(model)
    assert widths(model)[1] <= 30
    assert "neurons" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_gated_and_transposed_layers(family: str) -> None:
    from hf_sparse.modeling.architectures import known_sub_blocks

    model = decoders.build(family, intermediate_size=32) if family != "gpt2" else decoders.build(family, n_inner=32)
    sparsify(model, SparsityConfig(sparsity=0.6, pattern=BLOCKS, targets=FIRST[family]))
    model.eval()
    block = next(block for block in known_sub_blocks(model) if block.kind == "feed_forward")
    assert block.groups == 32
    with torch.no_grad():
        columns = block.output.weight if family != "gpt2" else block.output.weight.T
        columns[:, [1, 8, 9, 10, 11]] = 0
    expected = answers(model, decoders.batch())
    compact(model)
    block = next(block for block in known_sub_blocks(model) if block.kind == "feed_forward")
    assert block.groups == 28
    torch.testing.assert_close(answers(model, decoders.batch()), expected, atol=1e-5, rtol=1e-5)


def test_height_by_hand() -> None:
    zeros = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [1, 1], [0, 1]], dtype=torch.bool)
    every = torch.ones(7, dtype=torch.bool)
    assert height_of(zeros, every) == 2
    assert height_of(zeros.roll(1, 0), every) == 1
    odd = zeros.clone()
    odd[1] = ~odd[1]
    assert height_of(odd, every) == 1
    assert height_of(odd, torch.arange(7) != 1) == 2  # a row that is not looked at says nothing
    assert height_of(torch.zeros(8, 4, dtype=torch.bool), torch.ones(8, dtype=torch.bool)) == 1
    assert height_of(torch.tensor([[True, False]]).expand(8, 2), torch.ones(8, dtype=torch.bool)) == 1
