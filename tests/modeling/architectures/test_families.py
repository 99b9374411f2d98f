"""Which weights form a head or a neuron, for every family; and what is said where no family knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from hf_sparse import PatternError, RecipeError, SparsityConfig, compact, sparsify, summarize
from hf_sparse.formats.structure import Cut
from hf_sparse.modeling.architectures import (
    FAMILIES,
    find_sub_blocks,
    known_sub_blocks,
    match_sub_blocks,
    register_family,
)
from hf_sparse.modeling.architectures.base import Kind
from tests.helpers import structures

HEAD: tuple[Kind, ...] = ("attention",)
NEURON: tuple[Kind, ...] = ("feed_forward",)


@pytest.mark.parametrize("family", structures.FAMILIES)
def test_family_names_every_attention_and_feed_forward_of_its_model(family: str) -> None:
    model = structures.build(family)
    found = find_sub_blocks(model, "a test")
    layers = [layer for block in found for layer in (*block.inputs.values(), block.output)]
    inside = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in (".layer.", ".layers.", ".block."))
    ]
    assert {id(layer) for layer in layers} == {id(layer) for layer in inside}
    assert len(layers) == len(inside)  # each once
    assert [block.groups for block in found if block.kind == "attention"] == [4] * (6 if "t5" in family else 2)
    assert [block.groups for block in found if block.kind == "feed_forward"] == [12] * (4 if "t5" in family else 2)
    for block in found:
        for name, layer in (*block.inputs.items(), (block.output_name, block.output)):
            assert model.get_submodule(name) is layer
        assert model.get_submodule(block.name) is not None


def test_names_of_bert() -> None:
    found = {block.name: block for block in find_sub_blocks(structures.build("bert"), "a test")}
    layer = "bert.encoder.layer.1"
    assert list(found)[2:] == [f"{layer}.intermediate", f"{layer}.attention"]
    assert list(found[f"{layer}.intermediate"].inputs) == [f"{layer}.intermediate.dense"]
    assert found[f"{layer}.intermediate"].output_name == f"{layer}.output.dense"
    inputs = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
    assert list(found[f"{layer}.attention"].inputs) == inputs
    assert found[f"{layer}.attention"].output_name == f"{layer}.attention.output.dense"


def test_names_of_gated_t5() -> None:
    names = [block.name for block in find_sub_blocks(structures.build("t5-gated"), "a test")]
    assert names[:2] == ["encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"]
    assert names[4:7] == [
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
        "decoder.block.0.layer.2.DenseReluDense",
    ]
    gated = find_sub_blocks(structures.build("t5-gated"), "a test")[1]
    assert [name.rpartition(".")[2] for name in gated.inputs] == ["wi_0", "wi_1"]


@pytest.mark.parametrize(
    ("kinds", "targets", "exclude", "expected"),
    [
        (HEAD, None, (), ["encoder.layer.0.attention", "encoder.layer.1.attention"]),
        (NEURON, None, (), ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate"]),
        (HEAD, ["*.layer.1.*"], (), ["encoder.layer.1.attention"]),
        (HEAD, ["*.0.attention.self.key"], (), ["encoder.layer.0.attention"]),
        (NEURON, ["*.intermediate*"], ("*.layer.0.*",), ["encoder.layer.1.intermediate"]),
        (NEURON, ["encoder.layer.0.output.dense.weight"], (), ["encoder.layer.0.intermediate"]),
        (HEAD + NEURON, ["*.0.attention*", "*.1.intermediate*"], (), None),
    ],
)
def test_targets_are_globs_over_sub_blocks_and_their_layers(
    kinds: Any, targets: Any, exclude: Any, expected: list[str] | None
) -> None:
    found = match_sub_blocks(structures.build("bert").bert, kinds, targets, exclude, "pattern x")
    expected = expected or ["encoder.layer.0.attention", "encoder.layer.1.intermediate"]
    assert [block.name for block in found] == expected


def test_glob_that_matches_nothing_lists_what_could_match() -> None:
    with pytest.raises(
        RecipeError, match=r"`targets` '\*\.ffn' matches no feed_forward .* could match: encoder\.layer\.\*"
    ):
        match_sub_blocks(structures.build("bert").bert, NEURON, ["*.ffn"], (), "pattern neuron")
    with pytest.raises(RecipeError, match=r"`exclude` 'x' matches no attention"):
        match_sub_blocks(structures.build("bert").bert, HEAD, None, ["x"], "pattern head")
    with pytest.raises(RecipeError, match="together leave no attention"):
        match_sub_blocks(structures.build("bert").bert, HEAD, None, ["*"], "pattern head")


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("pattern", ["head", "neuron", "layer"])
def test_model_that_no_family_knows_is_an_error_that_says_how_to_add_one(pattern: str) -> None:
    model = bloom()
    message = (
        r"does not know that of BloomForCausalLM.*BERT.*DistilBERT.*T5.*one file in hf_sparse/modeling/architectures"
    )
    with pytest.raises(PatternError, match=message):
        sparsify(model, SparsityConfig(pattern=pattern, sparsity=0.5))
    with pytest.raises(PatternError, match=r"compact\(\) needs to know"):
        compact(model)
    assert known_sub_blocks(model) == []


@pytest.mark.parametrize("pattern", ["element", "2:4", {"name": "block", "rows": 4, "cols": 4}, "row"])
def test_model_that_no_family_knows_is_pruned_by_patterns_of_one_weight(pattern: Any) -> None:
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    sparsify(layers, SparsityConfig(targets="*", pattern=pattern, sparsity=0.5))
    assert summarize(layers).sparsity == 0.5


def test_class_of_the_same_name_that_is_built_otherwise_is_left_alone() -> None:
    class FFN(nn.Module):
        def __init__(self, width: int, **others: Any) -> None:
            super().__init__()
            self.lin1, self.lin2 = nn.Linear(4, 8), nn.Linear(width, 4)
            vars(self).update(others)

    class BertAttention(nn.Module):
        pass

    marks: dict[str, Any] = {"activation": torch.relu, "ff_chunk": None, "chunk_size_feed_forward": 0}
    assert known_sub_blocks(nn.ModuleList([FFN(8, **marks)]))[0].name == "0"
    assert known_sub_blocks(nn.ModuleList([FFN(8), FFN(6, **marks), BertAttention()])) == []


def test_family_is_registered_once() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())
    with pytest.raises(ValueError, match="registered twice"):
        register_family(next(iter(FAMILIES.values())))


def test_sub_block_that_has_lost_everything_is_left_out() -> None:
    model = structures.build("bert")
    structures.remove_others(model, {"bert.encoder.layer.0.attention": []})
    compact(model)
    with pytest.raises(RecipeError, match=r"`targets` '\*\.layer\.0\.\*' matches no attention"):
        sparsify(model, SparsityConfig(pattern="head", sparsity=0.5, targets="*.layer.0.*"))
    sparsify(model, SparsityConfig(pattern="head", sparsity=0.5))
    first, second = compact(model).heads.values()
    assert (first, len(second.kept)) == (Cut.of(4, ()), 2)
    assert model.bert.encoder.layer[1].attention.self.num_attention_heads == 2
    sparsify(model, SparsityConfig(scorer="random", sparsity=0.5))  # patterns of one weight leave the empty ones out
    assert summarize(model).sparsity == pytest.approx(0.5, abs=0.01)


def test_sub_block_that_shares_a_weight_is_left_out() -> None:
    model = structures.build("bert")
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    names = [block.name for block in find_sub_blocks(model, "a test")]
    assert names == [f"bert.encoder.layer.{index}.attention" for index in range(2)]
