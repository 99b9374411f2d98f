"""Convolutions are pruned as linear layers on their patches; groups are filters, channels and positions."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import PatternError, Pruner, RecipeError, SparsityConfig, keep_zeros, sparsify, summarize, to_runtime
from hf_sparse.modeling.layer_kinds import kind_of
from hf_sparse.modeling.layer_matching import block_layers
from tests.helpers.convolutional import build, images

PATTERNS: list[Any] = ["element", "2:4", "row", {"name": "block", "rows": 2, "cols": 6}]


def patches(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kind: Any = kind_of(conv)
    rows: torch.Tensor = kind.input_rows(conv, x)
    return rows


def pair() -> tuple[nn.Conv2d, nn.Linear]:
    """Return a convolution and the linear layer that computes the same on its patches."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    linear = nn.Linear(36, 6)
    linear.weight.data.copy_(conv.weight.data.flatten(1))
    linear.bias.data.copy_(conv.bias.data)  # type: ignore[union-attr]
    return conv, linear


@pytest.mark.parametrize("scorer", ["magnitude", "movement", "taylor", "rigl"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_convolution_is_pruned_in_training_as_the_linear_layer_of_its_patches(pattern: Any, scorer: str) -> None:
    conv, linear = pair()
    layers: list[nn.Module] = []
    for layer in (conv, linear):
        group: dict[str, Any] = {} if pattern == "2:4" else {"sparsity": 0.5}
        model = nn.Sequential(layer)
        pruner = Pruner(model, SparsityConfig(targets="*", pattern=pattern, scorer=scorer, **group)).attach()
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
        for step in range(3):
            x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(step))
            out = layer(x) if layer is conv else layer(patches(conv, x))
            out.square().mean().backward()
            pruner.observe()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step((step + 1) / 3)
        pruner.finish()
        pruner.bake()
        layers.append(layer)
    assert summarize(nn.Sequential(conv), ["0.weight"]).sparsity == 0.5
    assert torch.equal(conv.weight.flatten(1) != 0, linear.weight != 0)
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)


@pytest.mark.parametrize("scorer", ["wanda", "sparsegpt"])
def test_calibrated_scorers_see_the_patches(scorer: str) -> None:
    class Whole(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    conv, linear = pair()
    inputs = [torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    config = SparsityConfig(targets="*", scorer=scorer, pattern="2:4")
    unfolded = [{"x": patches(conv, x)} for x in inputs]
    sparsify(Whole(conv), config, [{"x": x} for x in inputs])
    sparsify(Whole(linear), config, unfolded)
    assert torch.equal(conv.weight.flatten(1) != 0, linear.weight != 0)
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)
    config = SparsityConfig(targets="*", scorer=scorer, sparsity=0.5)
    with pytest.raises(RecipeError, match=r"'layer\.weight', and these cannot be observed: it is a grouped"):
        sparsify(Whole(nn.Conv2d(4, 4, 3, groups=2)), config, [{"x": x} for x in inputs])


def test_channels_and_positions_by_hand() -> None:
    conv = nn.Conv1d(2, 2, 3, bias=False)
    conv.weight.data = torch.tensor([[[1.0, 5.0, 1.0], [2.0, 6.0, 2.0]], [[1.0, 1.0, 4.0], [2.0, 9.0, 4.0]]])
    made: list[Any] = [copy.deepcopy(nn.Sequential(conv)) for _ in range(3)]
    column, position, stripe = made
    sparsify(column, SparsityConfig(targets="*", pattern="column", sparsity=0.5))  # sums 13 and 25
    assert column[0].weight.ne(0).any(2).tolist() == [[False, True], [False, True]]
    sparsify(position, SparsityConfig(targets="*", pattern="kernel_position", sparsity=0.6))  # sums 6, 21, 11
    assert position[0].weight.ne(0).all(0).all(0).tolist() == [False, True, False]
    sparsify(stripe, SparsityConfig(targets="*", pattern={"name": "kernel_position", "by_filter": True}, sparsity=0.5))
    assert stripe[0].weight.ne(0).all(1).tolist() == [[False, True, False], [False, True, True]]
    with pytest.raises(PatternError, match=r"kernel_position needs a convolution .* and '0\.weight' has one"):
        sparsify(nn.Sequential(nn.Linear(4, 4)), SparsityConfig(targets="*", pattern="kernel_position", sparsity=0.5))
    with pytest.raises(PatternError, match=r"2:4 needs the input dimension to be a multiple of 4.*shape \(2, 27\)"):
        sparsify(nn.Sequential(nn.Conv2d(3, 2, 3)), SparsityConfig(targets="*", pattern="2:4"))


def test_default_targets_are_convolutions_only_where_the_blocks_have_no_linear_layers() -> None:
    names = set(block_layers(build("resnet")))
    assert len(names) == 8  # two of each block, and a shortcut in each stage
    assert all(name.startswith("resnet.encoder.stages.") for name in names)
    assert not any("projection" in name for name in block_layers(build("vit")))
    assert list(block_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))) == ["0"]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_model_with_convolutions_is_saved_packed_and_loaded(name: str, tmp_path: Path) -> None:
    model = build(name)
    sparsify(model, SparsityConfig(targets=["*patch_embed*"] if name == "vit" else None, sparsity=0.8))
    conv = next(name for name in model.hf_sparse_weights if model.get_parameter(name).ndim == 4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    optimizer, zeros = torch.optim.AdamW(loaded.parameters(), lr=0.1), loaded.get_parameter(conv) == 0
    loaded.train()(pixel_values=images(2), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert bool((loaded.get_parameter(conv)[zeros] == 0).all())
    assert not torch.equal(loaded.get_parameter(conv), model.get_parameter(conv))


def test_runtime_names_the_sparse_weights_that_it_computes_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = build("vit")
    sparsify(model, SparsityConfig(targets=["*projection", "*.mlp.*"], sparsity=0.9))
    with caplog.at_level(logging.WARNING):
        to_runtime(model, "csr")
    (message,) = [record.message for record in caplog.records if "packs linear layers" in record.message]
    assert "1 sparse weights of other layers (first: vit.embeddings.patch_embeddings.projection.weight)" in message


def test_zeros_of_a_convolution_from_elsewhere_are_kept() -> None:
    model: Any = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    model[0].weight.data[0] = 0.0
    optimizer = torch.optim.AdamW(keep_zeros(model, ["*"]).parameters(), lr=0.1)
    model(torch.ones(1, 2, 3, 3)).sum().backward()
    optimizer.step()
    assert model[0].weight.ne(0).flatten(1).all(1).tolist() == [False, True]
