"""Each kind of layer as a matrix: the matrix times the inputs that the kind names is what the layer computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.modeling.layer_kinds import Slot, is_linear, kind_of, matrix_shape, slots_of
from tests.helpers import decoders, mixtures

LAYERS: list[Any] = [
    lambda: nn.Linear(6, 4),
    lambda: Conv1D(4, 6),
    lambda: nn.Conv1d(3, 4, 2, stride=2, padding=1),
    lambda: nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), padding="same"),
    lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    lambda: nn.Conv3d(2, 4, 2),
]


@pytest.mark.parametrize("make", LAYERS)
def test_layer_is_its_matrix_times_its_inputs(make: Any) -> None:
    torch.manual_seed(0)
    layer = make()
    if is_linear(layer):
        x = torch.randn(2, 5, 6)
    else:
        x = torch.randn(2, layer.in_channels, *(7,) * len(layer.kernel_size))
    kind: Any = kind_of(layer)
    rows, view = kind.input_rows(layer, x), Slot(layer).view
    assert rows.shape[-1] == matrix_shape(layer)[1]
    out = rows @ view.to_matrix(layer.weight).t() + layer.bias
    torch.testing.assert_close(out if is_linear(layer) else out.movedim(-1, 1), layer(x))


@pytest.mark.parametrize(
    "make",
    [
        *LAYERS,
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
)
def test_view_and_its_inverse(make: Any) -> None:
    layer = make()
    (slot,) = slots_of(layer)
    view, numbers = slot.view, torch.arange(layer.weight.numel()).view(layer.weight.shape)
    matrix = view.to_matrix(numbers)
    assert matrix.shape == view.matrix_shape == matrix_shape(layer)
    assert torch.equal(view.to_stored(matrix), numbers)


def test_row_of_a_transposed_convolution_is_what_one_output_channel_reads() -> None:
    layer = nn.ConvTranspose1d(4, 6, 2, groups=2, bias=False)
    (slot,) = slots_of(layer)
    kept = torch.arange(6)[:, None].expand(slot.view.matrix_shape) == 4
    with torch.no_grad():
        layer.weight.mul_(slot.view.to_stored(kept))
    assert layer(torch.randn(1, 4, 3)).abs().sum((0, 2)).ne(0).tolist() == [False] * 4 + [True, False]


def test_experts_are_matrices_of_outputs_whichever_way_round_they_are_stored() -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    gpt_oss = transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**decoders.SIZES, **sizes}))
    llama4 = mixtures.build("llama4")
    for model, transposed in ((decoders.build("mixtral"), False), (gpt_oss, True), (llama4, True)):
        experts: Any = mixtures.mixture(model, 0).experts
        up, down = slots_of(experts)
        assert (up.attribute, up.view.matrix_shape) == ("gate_up_proj", (len(experts.gate_up_proj) * 24, 16))
        assert (down.attribute, down.view.matrix_shape) == ("down_proj", (len(experts.down_proj) * 16, 12))
        second = up.view.to_matrix(experts.gate_up_proj)[24 + 5]
        stored = experts.gate_up_proj[1, :, 5] if transposed else experts.gate_up_proj[1, 5]
        assert torch.equal(second, stored)


def test_module_that_holds_other_tensors_is_no_kind() -> None:
    assert slots_of(nn.Bilinear(2, 2, 2)) == ()
    assert slots_of(nn.LayerNorm(2)) == ()
