"""Pruned filters: what is scored, what is masked and what is removed, by hand; files of compacted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import PatternError, Pruner, RecipeError, SparsityConfig, compact, import_checkpoint, sparsify
from hf_sparse.hf.auto import load_whole
from hf_sparse.modeling.architectures import known_filters
from tests.helpers import convolutional
from tests.helpers.convolutional import TinyVGGConfig, TinyVGGForImageClassification, build, outputs


def small() -> Any:
    """Return a VGG whose first convolution has filters of L1 norms 4, 2, 3, 1."""
    model = TinyVGGForImageClassification(TinyVGGConfig(widths=(4, 3))).eval()
    with torch.no_grad():
        for filters, size in zip(model.vgg.features[0].weight, (4.0, 2.0, 3.0, 1.0), strict=True):
            filters.fill_(size / filters.numel())
    return model


def test_filters_of_the_smallest_norm_are_masked_where_they_are_read_and_zero_once_baked() -> None:
    model = small()
    config = SparsityConfig(pattern="filter", sparsity=0.5, schedule="constant", targets=["*features.0"])
    pruner = Pruner(model, config).attach()
    pruner.step(1.0)
    first, norm, second = model.vgg.features[0], model.vgg.features[1], model.vgg.features[4]
    assert second.weight.ne(0).all(3).all(2).all(0).tolist() == [True, False, True, False]
    assert bool(first.weight.ne(0).all())  # their gradient still tells what they would be worth
    pruner.bake()
    assert first.weight.ne(0).flatten(1).any(1).tolist() == [True, False, True, False]
    assert (first.bias[1], norm.weight[3], norm.bias[1]) == (0, 0, 0)
    assert set(model.hf_sparse_weights) == {"vgg.features.0.weight", "vgg.features.4.weight"}
    edits = compact(model)
    assert [(kind, name, cut.kept) for kind, name, cut in edits] == [("filters", "vgg.features.0", (0, 2))]
    assert (first.out_channels, norm.num_features, second.in_channels) == (2, 2, 2)
    assert tuple(norm.running_mean.shape) == (2,)


def test_taylor_scores_a_filter_by_the_weights_that_read_it() -> None:
    model = small()
    config = SparsityConfig(pattern="filter", sparsity=0.25, scorer="taylor", targets=["*features.0"])
    second = model.vgg.features[4]
    with torch.no_grad():
        second.weight[:, 2] = 1e-6  # the filter itself is large
    batches = [{"pixel_values": convolutional.images(), "labels": torch.tensor([0, 1, 2])}]
    sparsify(model, config, batches)
    assert second.weight.ne(0).flatten(2).any(2).any(0).tolist() == [True, True, False, True]


def test_zero_filters_stay_zero_in_training_and_a_second_pruning_goes_on() -> None:
    model = build("vgg")
    sparsify(model, SparsityConfig(pattern="filter", sparsity=0.5))
    before = {name: tensor == 0 for name, tensor in model.named_parameters() if tensor.ndim == 4}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.train()(pixel_values=convolutional.images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    for name, zeros in before.items():
        assert bool((model.get_parameter(name)[zeros] == 0).all()), name
    compact(model.eval())
    sparsify(model, SparsityConfig(pattern="filter", sparsity=0.5))
    expected = outputs(model)
    edits = compact(model)
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    assert {name: (cut.before, cut.count) for _, name, cut in edits} == {
        "vgg.features.0": (6, 1), "vgg.features.4": (8, 2), "vgg.features.8": (10, 2),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vgg", "resnet-bottleneck"])
def test_compacted_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = build(name)
    sparsify(model, SparsityConfig(pattern="filter", sparsity=0.5))
    compact(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(RecipeError, match="a compacted model cannot be saved dense"):
        model.save_pretrained(tmp_path, format="dense")


def test_element_and_row_zeros_do_not_make_a_filter_leave() -> None:
    model = build("vgg")
    sparsify(model, SparsityConfig(pattern="row", sparsity=0.5, targets="*features*"))
    assert not compact(model)  # a zero filter with a batch norm behind it is a constant that the next layer reads


def test_one_filter_stays_where_nothing_is_read() -> None:
    model = build("vgg-plain")
    with torch.no_grad():
        model.vgg.features[3].weight.zero_()
    expected = outputs(model)
    compact(model)
    assert model.vgg.features[0].out_channels == 1
    torch.testing.assert_close(outputs(model), expected)


def test_filters_that_others_are_added_to_stay() -> None:
    names = {block.name for block in known_filters(build("resnet-bottleneck"))}
    assert len(names) == 6
    assert not any("shortcut" in name or ".layer.2." in name or "embedder" in name for name in names)


@pytest.mark.parametrize(
    "between", [nn.Softmax(1), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.LayerNorm(4), nn.ChannelShuffle(2)]
)
def test_sequence_with_anything_that_mixes_channels_is_no_row(between: nn.Module) -> None:
    model = build("vgg-plain")
    model.vgg.features[1] = between
    found = {block.name for block in known_filters(model)}
    expected = {nn.BatchNorm2d: {0, 3, 6}, nn.Conv2d: {6}}.get(
        type(between), set()
    )  # grouped: neither it nor around it
    if isinstance(between, nn.Conv2d):
        expected = {3, 6}
    assert found == {f"vgg.features.{number}" for number in expected}


@pytest.mark.parametrize("name", ["resnet", "resnet-bottleneck"])
def test_dense_checkpoint_is_compacted_while_it_is_converted(name: str, tmp_path: Path) -> None:
    model = build(name)
    sparsify(model, SparsityConfig(pattern="filter", sparsity=0.5))
    model.save_pretrained(tmp_path / "dense", format="dense")
    expected, edits = outputs(model), compact(model)
    removed = sum(cut.before - cut.count for _, _, cut in edits)
    total = sum(cut.before for _, _, cut in edits)
    counted = import_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert f"zero as a whole: {removed} of {total} filters; --compact removes them" in str(counted)
    done = import_checkpoint(tmp_path / "dense", tmp_path / "small", compact=True)
    assert len(done.edits) == len(list(edits))
    small = load_whole(str(tmp_path / "small")).eval()
    assert small.num_parameters() == model.num_parameters()
    torch.testing.assert_close(outputs(small), expected, atol=1e-5, rtol=1e-5)


def test_models_without_filters_are_refused() -> None:
    with pytest.raises(PatternError, match="a head, a neuron or a filter"):
        sparsify(nn.Sequential(nn.Conv2d(3, 4, 3)), SparsityConfig(pattern="filter", sparsity=0.5))
