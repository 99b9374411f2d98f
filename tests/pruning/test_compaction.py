"""A model without its removed heads and neurons is the masked model: outputs, loss, gradients, generation, training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from hf_sparse import Pruner, SparsityConfig, SparsityError, compact, sparsify
from hf_sparse.formats.structure import Cut
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.pruning.compaction import edits_of
from tests.helpers import decoders, structures

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
IMPLEMENTATIONS = ("eager", "sdpa")
GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True},
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
}


def pair(family: str, seed: int = 0, **options: Any) -> tuple[Any, Any, dict[str, list[int]]]:
    """Return a model with random heads and neurons zero, the same compacted, and the survivors."""
    masked = structures.build(family, seed, **options)
    chosen = structures.choose(masked, seed)
    structures.remove_others(masked, chosen)
    small = copy.deepcopy(masked)
    compact(small)
    return masked, small, chosen


def same_gradients(masked: nn.Module, small: nn.Module, chosen: dict[str, list[int]], at_least: int = 20) -> None:
    """Compare the gradients of all that remains."""
    lines: dict[str, tuple[list[int], int]] = {}
    for block in find_sub_blocks(masked, "a test"):
        lines |= structures.live_lines(block, chosen.get(block.name, list(range(block.groups))))
    compared = 0
    own = dict(small.named_parameters())
    for name, parameter in masked.named_parameters():
        if parameter.grad is None:
            assert own[name].grad is None, name
            continue
        expected = parameter.grad
        if name in lines:
            live, axis = lines[name]
            expected = expected.index_select(axis, torch.tensor(live, dtype=torch.long))
        found = own[name].grad
        if not expected.any():  # what only led to something that is gone
            assert found is None or not found.any(), name
            continue
        assert found is not None, name
        assert float((found - expected).abs().max()) < CLOSE["atol"], name
        compared += 1
    assert compared >= at_least


def each(names: Iterable[str], survivors: list[int]) -> dict[str, list[int]]:
    return {name: list(survivors) for name in names}


def generate(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    torch.manual_seed(0)
    # Each word once, so that the order of many logits counts and not only which is the highest.
    how = {"min_new_tokens": 12, "max_new_tokens": 12, "no_repeat_ngram_size": 1, **how}
    return model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **how)


# -- masked is compacted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", structures.FAMILIES)
def test_compacted_model_has_the_outputs_loss_and_gradients_of_the_masked_one(family: str, implementation: str) -> None:
    if family in structures.EAGER and implementation == "sdpa":
        pytest.skip("transformers has no sdpa for this family")
    masked, small, chosen = pair(family, attn_implementation=implementation)
    for block in find_sub_blocks(small, "a test"):
        assert block.groups == len(chosen[block.name])
    inputs = structures.batch(family)
    expected, found = masked(**inputs), small(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    expected.loss.backward()
    found.loss.backward()
    same_gradients(masked, small, chosen)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt-neox", "gemma3"])
def test_compacted_decoder_has_the_gradients_of_the_masked_one(family: str) -> None:
    masked = decoders.build(family)
    chosen = structures.choose(masked)
    structures.remove_others(masked, chosen)
    small = copy.deepcopy(masked)
    compact(small)
    for model in (masked, small):
        model(**decoders.batch()).loss.backward()
    same_gradients(masked, small, chosen, at_least=15)


def test_comparison_of_gradients_can_fail() -> None:
    masked, small, chosen = pair("bert")
    for model in (masked, small):
        model(**structures.batch("bert")).loss.backward()
    same_gradients(masked, small, chosen)
    small.bert.encoder.layer[0].attention.self.query.bias.grad[0] += 1e-3
    with pytest.raises(AssertionError, match=r"layer\.0\.attention\.self\.query\.bias"):
        same_gradients(masked, small, chosen)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_compacted_model_generates_what_the_masked_one_does(family: str, implementation: str, seed: int) -> None:
    masked, small, _ = pair(family, seed, attn_implementation=implementation)
    inputs = structures.batch(family, seed)
    for name, how in GENERATIONS.items():
        expected = generate(masked, inputs, **how)
        assert torch.equal(generate(small, inputs, **how), expected), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoder_with_the_layout_of_bert_generates_what_the_masked_one_does(implementation: str) -> None:
    options: dict[str, Any] = {**structures.SIZES, "is_decoder": True, "attn_implementation": implementation}
    config = BertConfig(**options)
    torch.manual_seed(0)
    masked = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for chosen in (structures.choose(masked), each(["bert.encoder.layer.0.attention"], [])):
        structures.remove_others(masked, chosen)
        small = copy.deepcopy(masked)
        compact(small)
        inputs = structures.batch("bert")
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        for how in ({}, {"num_beams": 2}):
            assert torch.equal(generate(small, inputs, **how), generate(masked, inputs, **how))


# -- all heads, all neurons, the last layer ----------------------------------------------------------------------------


def gone(family: str, what: str) -> list[str]:
    """Return the names of sub-blocks that lose everything."""
    model = structures.build(family)
    blocks = find_sub_blocks(model, "a test")
    if what == "all heads":
        return [block.name for block in blocks if block.kind == "attention"]
    if what == "all neurons":
        return [block.name for block in blocks if block.kind == "feed_forward"]
    if what == "everything":
        return [block.name for block in blocks]
    names = [block.name for block in blocks]
    if "t5" in family:
        first, last = ("encoder.block.0.", "decoder.block.0."), ("encoder.block.1.", "decoder.block.1.")
    else:
        first, last = (".layer.0.",), (".layer.1.",)  # type: ignore[assignment]
    parts = first if what == "first layer" else last
    return [name for name in names if any(part in name for part in parts)]


GONE = ("all heads", "all neurons", "first layer", "last layer", "everything")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "t5-gated"])
def test_sub_block_that_loses_everything_leaves_its_output_bias_exactly(
    family: str, what: str, implementation: str
) -> None:
    masked = structures.build(family, attn_implementation=implementation)
    names = gone(family, what)
    assert names
    structures.remove_others(masked, each(names, []))
    small = copy.deepcopy(masked)
    edits = compact(small)
    assert {name for _, name, cut in edits if not cut.kept} == set(names)
    seen: dict[str, Tensor] = {}
    for block in find_sub_blocks(small, "a test"):
        if block.name in names:
            assert block.output.weight.numel() == sum(layer.weight.numel() for layer in block.inputs.values()) == 0
            assert not any(layer.weight.requires_grad for layer in (*block.inputs.values(), block.output))
            block.output.register_forward_hook(lambda *call, name=block.name: seen.setdefault(name, call[2]))
    inputs = structures.batch(family)
    expected, found = masked(**inputs), small(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert set(seen) == set(names)
    for block in find_sub_blocks(masked, "a test"):
        if block.name in names:
            bias = block.output.bias if block.output.bias is not None else torch.zeros(16)
            assert torch.equal(seen[block.name], bias.expand_as(seen[block.name])), block.name
    expected.loss.backward()
    found.loss.backward()
    same_gradients(masked, small, each(names, []), at_least=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_model_that_lost_whole_sub_blocks_generates_what_the_masked_one_does(
    family: str, what: str, implementation: str
) -> None:
    masked = structures.build(family, attn_implementation=implementation)
    structures.remove_others(masked, each(gone(family, what), []))
    small = copy.deepcopy(masked)
    compact(small)
    for name, how in GENERATIONS.items():
        inputs = structures.batch(family)
        assert torch.equal(generate(small, inputs, **how), generate(masked, inputs, **how)), name


# -- how it runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", structures.MAIN)
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    masked, small, chosen = pair(family)
    names = [name for name in chosen if ".0." in name and "ttention" in name]
    for empty in (False, True):
        if empty:
            structures.remove_others(masked, each(names, []))
            small = copy.deepcopy(masked)
            compact(small)
        small.train()
        small.activation_checkpointing_enable({"use_reentrant": reentrant})
        small.enable_input_require_grads()
        masked.zero_grad()
        masked(**structures.batch(family)).loss.backward()
        small(**structures.batch(family)).loss.backward()
        same_gradients(masked, small, {**chosen, **each(names, [])} if empty else chosen)


@pytest.mark.parametrize(("family", "implementation"), [("bert", "sdpa"), ("t5", "sdpa"), ("t5-gated", "eager")])
def test_compiler_takes_the_model_in_one_graph(family: str, implementation: str) -> None:
    _, small, chosen = pair(family, attn_implementation=implementation)
    structures.remove_others(small, {next(name for name in chosen if "ttention" in name): []})
    compact(small)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        inputs = structures.batch(family, seed)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, small(**inputs).logits, **CLOSE)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "t5-gated"])
def test_inductor_computes_outputs_and_gradients_of_the_masked_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # a run that was killed leaves half a file in the other
    masked, small, chosen = pair(family)
    compiled = torch.compile(small)
    inputs = structures.batch(family)
    torch.testing.assert_close(compiled(**inputs).logits, masked(**inputs).logits, **CLOSE)
    compiled(**inputs).loss.backward()
    masked(**inputs).loss.backward()
    same_gradients(masked, small, chosen)
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", structures.MAIN)
def test_bfloat16_runs_and_agrees_as_well_as_bfloat16_can(family: str, implementation: str) -> None:
    masked, _, _ = pair(family, attn_implementation=implementation)
    exact = masked(**structures.batch(family)).logits
    masked.to(torch.bfloat16)
    small = copy.deepcopy(masked)
    compact(small)
    inputs = structures.batch(family)
    expected, found = masked(**inputs), small(**inputs)
    assert found.logits.dtype == torch.bfloat16
    rounding = (expected.logits.float() - exact).abs().max()
    assert (found.logits.float() - exact).abs().max() < 2 * rounding + 1e-2
    found.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in small.parameters())


@pytest.mark.parametrize("family", structures.MAIN)
def test_training_goes_on_as_that_of_the_masked_model(family: str) -> None:
    groups = [{"pattern": pattern, "sparsity": 0.5} for pattern in ("head", "neuron")]
    masked = sparsify(structures.build(family), SparsityConfig(groups=groups))
    small = copy.deepcopy(masked)
    edits = compact(small)
    losses: list[list[float]] = []
    for model in (masked.train(), small.train()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(8):
            loss = model(**structures.batch(family)).loss
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert len(dict(edits.heads)) == sum(block.kind == "attention" for block in find_sub_blocks(masked, "a test"))


@pytest.mark.parametrize("family", structures.MAIN)
def test_copies_and_pickles_are_the_small_model(family: str) -> None:
    _, small, chosen = pair(family)
    structures.remove_others(small, {next(name for name in chosen if "ttention" in name): []})
    compact(small)
    inputs = structures.batch(family)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301  made one line above
        assert torch.equal(other(**inputs).logits, small(**inputs).logits)
        assert edits_of(other) == edits_of(small)
        assert [type(m) for m in other.modules()] == [type(m) for m in small.modules()]


# -- what goes and what stays ------------------------------------------------------------------------------------------


def feed_forward(model: Any) -> tuple[nn.Linear, nn.Linear]:
    layer = model.bert.encoder.layer[0]
    return layer.intermediate.dense, layer.output.dense


def test_constant_of_a_neuron_without_input_goes_into_the_next_bias() -> None:
    model = structures.build("bert")
    first, second = feed_forward(model)
    with torch.no_grad():
        first.weight[[2, 5]] = 0.0
        first.bias[2], first.bias[5] = 1.5, -0.5
    before = model(**structures.batch("bert")).logits
    bias = second.bias.detach().clone()
    constants = nn.functional.gelu(torch.tensor([1.5, -0.5], dtype=torch.float64)).float()
    expected = bias + second.weight[:, [2, 5]].detach() @ constants
    edits = compact(model)
    assert edits.neurons["bert.encoder.layer.0.intermediate"].kept == (0, 1, 3, 4, 6, 7, 8, 9, 10, 11)
    torch.testing.assert_close(second.bias.detach(), expected)
    torch.testing.assert_close(model(**structures.batch("bert")).logits, before, **CLOSE)


def test_neuron_goes_if_its_column_is_zero_whatever_its_row_is() -> None:
    model = structures.build("bert")
    first, second = feed_forward(model)
    with torch.no_grad():
        second.weight[:, 3] = 0.0
    before, bias = model(**structures.batch("bert")).logits, second.bias.detach().clone()
    compact(model)
    assert (first.out_features, second.in_features) == (11, 11)
    assert torch.equal(second.bias, bias)
    torch.testing.assert_close(model(**structures.batch("bert")).logits, before, **CLOSE)


@pytest.mark.parametrize("part", ["wi_0", "wi_1"])
def test_gated_neuron_goes_if_one_of_its_rows_is_zero(part: str) -> None:
    model = structures.build("t5-gated")
    layer = model.encoder.block[0].layer[1].DenseReluDense
    with torch.no_grad():
        getattr(layer, part).weight[4] = 0.0
    before = model(**structures.batch("t5-gated")).logits
    assert compact(model).neurons["encoder.block.0.layer.1.DenseReluDense"].kept == (0, 1, 2, 3, *range(5, 12))
    torch.testing.assert_close(model(**structures.batch("t5-gated")).logits, before, **CLOSE)


def test_constant_with_no_bias_to_go_into_stays() -> None:
    model = structures.build("t5", feed_forward_proj="sigmoid")  # sigmoid(0) is not 0, and T5 has no biases
    layer = model.encoder.block[0].layer[1].DenseReluDense
    with torch.no_grad():
        layer.wi.weight[4] = 0.0
    assert not compact(model)
    assert layer.wi.out_features == 12


@pytest.mark.parametrize(("what", "leaves"), [("columns", True), ("values", True), ("query", False), ("rows", False)])
def test_head_goes_if_nothing_comes_out_of_it(what: str, leaves: bool) -> None:
    model = structures.build("bert")
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        if what == "columns":
            attention.output.dense.weight[:, 4:8] = 0.0
        if what in ("values", "rows"):
            attention.self.value.weight[4:8] = 0.0
        if what == "values":  # with its bias; without it, the head is a constant while no dropout changes it
            attention.self.value.bias[4:8] = 0.0
        if what == "query":
            attention.self.query.weight[4:8] = attention.self.query.bias[4:8] = 0.0
    before = model(**structures.batch("bert")).logits
    edits = compact(model)
    assert dict(edits.heads) == ({"bert.encoder.layer.0.attention": Cut.of(4, (0, 2, 3))} if leaves else {})
    torch.testing.assert_close(model(**structures.batch("bert")).logits, before, **CLOSE)


def test_block_pruning_that_leaves_empty_heads_and_neurons_is_compacted_too() -> None:
    model = structures.build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.output.dense.weight[:, 12:] *= 1e-3
    groups: list[Any] = [
        {"targets": "*.attention.*", "pattern": {"name": "block", "rows": 4, "cols": 4}, "sparsity": 0.25},
        {"targets": "*.intermediate.dense", "pattern": "row", "sparsity": 0.5},
    ]
    sparsify(model, SparsityConfig(groups=groups))
    before = model(**structures.batch("bert")).logits
    edits = compact(model)
    assert edits.heads["bert.encoder.layer.1.attention"].kept == (0, 1, 2)
    assert [len(cut.kept) for cut in edits.neurons.values()] == [6, 6]
    torch.testing.assert_close(model(**structures.batch("bert")).logits, before, **CLOSE)


@pytest.mark.parametrize("family", structures.MAIN)
def test_edits_compose_and_keep_the_numbers_of_the_first_model(family: str) -> None:
    model = structures.build(family)
    blocks = {block.name: block for block in find_sub_blocks(model, "a test")}
    heads = [name for name, block in blocks.items() if block.kind == "attention"]
    structures.remove_others(model, each(heads, [0, 2, 3]))
    assert dict(compact(model).heads) == dict.fromkeys(heads, Cut.of(4, (0, 2, 3)))
    reference = copy.deepcopy(model)
    structures.remove_others(reference, each(heads, [1, 2]))  # those were 2 and 3
    structures.remove_others(model, each(heads, [1, 2]))
    assert dict(compact(model).heads) == dict.fromkeys(heads, Cut.of(4, (2, 3)))
    inputs = structures.batch(family)
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, **CLOSE)


def test_frozen_weights_stay_frozen_and_layers_stay_plain() -> None:
    model = structures.build("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    structures.remove_others(model, structures.choose(model))
    compact(model)
    assert not any(parameter.requires_grad for parameter in model.bert.encoder.layer[0].parameters())
    assert all(parameter.requires_grad for parameter in model.bert.encoder.layer[1].parameters())
    query = model.bert.encoder.layer[0].attention.self.query
    assert type(query) is nn.Linear
    assert query.weight.shape == (query.out_features, query.in_features)


def test_dense_model_is_left_as_it_is() -> None:
    model = structures.build("bert")
    before = model.state_dict()
    assert not compact(model)
    assert not edits_of(model)
    assert not hasattr(model, "hf_quantizer")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_masked_model_is_refused() -> None:
    model = structures.build("bert")
    pruner = Pruner(model, SparsityConfig(targets="*.query", sparsity=0.5)).attach()
    with pytest.raises(SparsityError, match=r"query' still has a mask\. End the pruning first"):
        compact(model)
    pruner.bake()
    compact(model)


def test_model_that_is_not_in_memory_is_refused() -> None:
    with pytest.raises(SparsityError, match="is not in memory"):
        compact(structures.build("bert").to("meta"))
