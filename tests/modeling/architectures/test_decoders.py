"""Decoders without heads, KV heads and neurons are the masked decoders: logits, generation with every cache, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, compact, sparsify
from hf_sparse.modeling.architectures import find_sub_blocks, known_sub_blocks
from hf_sparse.pruning.compaction import edits_of
from tests.helpers import decoders, structures

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
KINDS = ("attention", "feed_forward")
IMPLEMENTATIONS = ("eager", "sdpa")
GENERATIONS: dict[str, dict[str, Any]] = {
    "dynamic-cache": {},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "beam": {"num_beams": 3},
    "beam-static": {"num_beams": 2, "cache_implementation": "static"},
}
HOWS = [
    how if how in ("dynamic-cache", "static-cache", "beam") else pytest.param(how, marks=pytest.mark.slow)
    for how in GENERATIONS
]


def build(family: str, seed: int = 0, **options: Any) -> Any:
    if family == "gemma2" and options.get("attn_implementation") == "sdpa":
        pytest.skip("transformers has no sdpa for Gemma 2, whose attention scores are capped")
    return decoders.build(family, seed, **options)


def pair(family: str, seed: int = 0, **options: Any) -> tuple[Any, Any, dict[str, list[int]]]:
    """Return a model with random heads and neurons zero, the same compacted, and the survivors."""
    masked = build(family, seed, **options)
    chosen = structures.choose(masked, seed)
    structures.remove_others(masked, chosen)
    small = copy.deepcopy(masked)
    compact(small)
    return masked, small, chosen


def logits(model: Any) -> Tensor:
    """Return the logits of real positions, with padding and without."""
    inputs = decoders.batch()
    with torch.no_grad():
        padded = model(**inputs).logits[inputs["attention_mask"].bool()]
        plain = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
    return torch.cat([padded, plain])


def generate(model: Any, **how: Any) -> list[list[int]]:
    torch.manual_seed(0)
    inputs = decoders.batch()
    # Longer than the sliding windows; each token once, so that the order of many logits counts.
    how = {"min_new_tokens": 14, "max_new_tokens": 14, "no_repeat_ngram_size": 1, "do_sample": False, **how}
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    generated: list[list[int]] = model.generate(**given, **how).tolist()
    return generated


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", decoders.EACH)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_compacted_decoder_has_the_logits_of_the_masked_one(family: str, implementation: str, seed: int) -> None:
    masked, small, chosen = pair(family, seed, attn_implementation=implementation)
    for block in find_sub_blocks(small, "a test"):
        assert block.groups == len(chosen[block.name])
    torch.testing.assert_close(logits(small), logits(masked), **CLOSE)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("family", decoders.EACH)
def test_compacted_decoder_generates_what_the_masked_one_does(family: str, how: str) -> None:
    masked, small, _ = pair(family, seed=len(how) % 3)
    assert generate(small, **GENERATIONS[how]) == generate(masked, **GENERATIONS[how])


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_eager_attention_generates_what_the_masked_one_does(family: str) -> None:
    masked, small, _ = pair(family, seed=2, attn_implementation="eager")
    for how in ({}, {"cache_implementation": "static"}):
        assert generate(small, **how) == generate(masked, **how)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", decoders.EACH)
def test_decoder_that_lost_whole_sub_blocks_generates_what_the_masked_one_does(
    family: str, implementation: str
) -> None:
    masked = build(family, attn_implementation=implementation)
    names = [block.name for block in find_sub_blocks(masked, "a test")]
    # The first attention, whose cache says how long the sequence is, and the last feed-forward part.
    attention = next(name for name in names if "att" in name)
    gone = [attention, *[name for name in names if "att" not in name][-1:]]
    structures.remove_others(masked, {name: [] for name in gone})
    small = copy.deepcopy(masked)
    compact(small)
    assert sum(block.groups == 0 for block in known_sub_blocks(small)) == len(gone)
    torch.testing.assert_close(logits(small), logits(masked), **CLOSE)
    for how in ({}, {"cache_implementation": "static"}):
        assert generate(small, **how) == generate(masked, **how)


@pytest.mark.parametrize("family", decoders.EACH)
def test_uneven_decoder_is_saved_and_loaded_after_two_rounds(family: str, tmp_path: Path) -> None:
    model = decoders.build(family)
    attentions, neurons = ([b.name for b in find_sub_blocks(model, "a test") if b.kind == kind] for kind in KINDS)
    first = dict(zip(attentions, ([0, 2, 3], [1, 2, 3]), strict=True))
    first |= dict(zip(neurons, ([*range(9)], [1, 4, 5, 9, 11]), strict=False))  # Mixtral has none
    second = {attentions[0]: [0, 2], **dict(zip(neurons, ([*range(2, 9)], [0, 1, 3, 4]), strict=False))}
    structures.remove_others(model, first)
    compact(model)
    structures.remove_others(model, second)
    reference = copy.deepcopy(model)
    edits = compact(model)
    assert edits == edits_of(model)
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    for _, name, cut in edits:
        kept = first[name]
        assert cut.kept == tuple(kept[index] for index in second.get(name, range(len(kept)))), name
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert edits_of(loaded) == edits
    assert torch.equal(logits(loaded), logits(model))
    assert generate(loaded) == generate(model)


# -- units -------------------------------------------------------------------------------------------------------------


def zero_heads(model: nn.Module) -> dict[str, list[int]]:
    """Return for each attention the heads whose output columns are all zero."""
    found = {}
    for block in find_sub_blocks(model, "a test"):
        if block.kind == "attention":
            found[block.name] = (block.exit.weights() == 0).flatten(1).all(1).nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("family", decoders.GROUPED)
def test_kv_head_leaves_with_all_heads_that_read_it(family: str) -> None:
    model = decoders.build(family)
    sparsify(model, SparsityConfig(pattern="kv_head", sparsity=0.5))
    for heads in zero_heads(model).values():
        assert heads in ([0, 1], [2, 3])
    masked = copy.deepcopy(model)
    compact(model)
    assert {(block.groups, block.heads_per_kv) for block in known_sub_blocks(model) if block.kind == "attention"} == {
        (2, (2,))
    }
    torch.testing.assert_close(logits(model), logits(masked), **CLOSE)


@pytest.mark.parametrize("family", decoders.GROUPED)
def test_query_heads_leave_key_and_value_that_others_read(family: str) -> None:
    model = decoders.build(family)
    blocks = [block for block in known_sub_blocks(model) if block.kind == "attention"]
    keys = [block.parts[1].weights().clone() for block in blocks]
    sparsify(model, SparsityConfig(pattern="head", sparsity=0.25))
    assert all(len(heads) == 1 for heads in zero_heads(model).values())
    assert all(torch.equal(block.parts[1].weights(), key) for block, key in zip(blocks, keys, strict=True))
    masked = copy.deepcopy(model)
    compact(model)
    counts = [block.heads_per_kv for block in known_sub_blocks(model) if block.kind == "attention"]
    assert set(counts) <= {(1, 2), (2, 1)}
    torch.testing.assert_close(logits(model), logits(masked), **CLOSE)


def test_score_of_a_kv_head_is_the_mean_of_all_its_weights() -> None:
    from hf_sparse.config.sparsity import PATTERNS
    from hf_sparse.pruning.unit_finding import find_units

    model = decoders.build("phi3")
    (unit,) = find_units(model, PATTERNS.build("kv_head"), ["*.0.self_attn"], ())
    unit.make_masks((), {})
    scores = unit.pool([member.module.weight.detach().abs() for member in unit.members])
    attention = model.model.layers[0].self_attn
    qkv, out = attention.qkv_proj.weight.detach().abs(), attention.o_proj.weight.detach().abs()
    rows = [*range(8), *range(16, 20), *range(24, 28)]  # two queries of four lines, then key, then value
    expected = torch.cat([qkv[rows].flatten(), out[:, :8].flatten()]).mean()
    torch.testing.assert_close(scores[0], expected)


# -- what the config can say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mistral"])
def test_even_removal_is_plain_config(family: str, tmp_path: Path) -> None:
    model = decoders.build(family)
    sparsify(model, SparsityConfig(pattern="kv_head+neuron", sparsity=0.5))
    masked = copy.deepcopy(model)
    edits = compact(model)
    assert len(list(edits)) == 4
    assert not edits_of(model)
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [getattr(model.config, size) for size in sizes] == [2, 1, 6, 4]
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "hf_sparse" not in text
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not hasattr(plain, "hf_quantizer") or plain.hf_quantizer is None
    torch.testing.assert_close(logits(plain), logits(masked), **CLOSE)
    assert generate(plain, cache_implementation="static") == generate(masked, cache_implementation="static")


@pytest.mark.parametrize(
    ("family", "key"), [("gpt-neox", "intermediate_size"), ("gpt2", "n_inner"), ("opt", "ffn_dim")]
)
def test_config_says_neurons_where_it_cannot_say_heads(family: str, key: str, tmp_path: Path) -> None:
    model = decoders.build(family)
    sparsify(model, SparsityConfig(pattern="head+neuron", sparsity=0.5))
    masked = copy.deepcopy(model)
    compact(model)
    assert getattr(model.config, key) == 6
    assert len(edits_of(model).heads) == 2
    assert not edits_of(model).neurons
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(masked), **CLOSE)


def test_second_round_counts_from_the_config_of_the_first(tmp_path: Path) -> None:
    model = decoders.build("llama")
    sparsify(model, SparsityConfig(pattern="neuron", sparsity=0.5))
    compact(model)
    name = "model.layers.1.mlp"
    structures.remove_others(model, {name: [0, 2, 5]})
    masked = copy.deepcopy(model)
    edits = compact(model)
    assert [(each, cut.before, cut.kept) for _, each, cut in edits] == [(name, 6, (0, 2, 5))]
    assert model.config.intermediate_size == 6
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(masked), **CLOSE)
    structures.remove_others(loaded, {"model.layers.0.mlp": [1, 3, 4]})
    compact(loaded)
    assert loaded.config.intermediate_size == 3
    assert not edits_of(loaded)
