"""Depth: a model without layers is the one that skips them; its config says so, and caches follow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_sparse import (
    PatternError,
    RecipeError,
    SparsityConfig,
    SparsityError,
    compact,
    drop_layers,
    layer_importance,
    prune_layers,
    sparsify,
)
from hf_sparse.modeling.model_state import sparse_weights
from hf_sparse.pruning.compaction import edits_of
from hf_sparse.pruning.depth import stack_of
from tests.helpers import decoders, structures
from tests.modeling.architectures.test_decoders import CLOSE, generate, logits

FOUR = {"num_hidden_layers": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "gpt2": {"n_layer": 4, "num_hidden_layers": 4},
}


def build(family: str, **options: Any) -> Any:
    options = {**FOUR, **OPTIONS.get(family, {}), **options}
    if family == "gpt2":
        options.pop("num_hidden_layers")
    return decoders.build(family, **options)


def skipping(model: Any, dropped: list[int]) -> Any:
    """Return a copy in which these layers give their input on."""
    model = copy.deepcopy(model)
    for index in dropped:
        stack_of(model)[1][index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


@pytest.mark.parametrize("family", decoders.EACH)
def test_model_without_layers_is_the_one_that_skips_them(family: str, tmp_path: Path) -> None:
    model = build(family)
    reference = skipping(model, [0, 2])
    drop_layers(model, [2, 0])
    assert model.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    expected = generate(reference, use_cache=False)  # a skipped layer does not fill its cache
    for how in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert generate(model, **how) == expected, how
    indices = {module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")}
    assert indices <= {0, 1}
    model.save_pretrained(tmp_path)
    assert "hf_sparse" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain), logits(model))


def test_layer_types_follow() -> None:
    model = build("gemma3")
    drop_layers(model, [1])
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.is_sliding for layer in model.model.layers] == [True, False, True]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_numbers_of_layers_without_experts_follow() -> None:
    model = build("qwen3-moe")
    drop_layers(build("qwen3-moe"), [0])
    drop_layers(model, [1])
    assert model.config.mlp_only_layers == [0]


def test_layer_that_depends_on_its_number_in_another_way_is_refused() -> None:
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = logits(model)
    with pytest.raises(PatternError, match=r"'transformer\.h\.1' would become layer 0.*depends on its number"):
        drop_layers(model, [0])
    assert torch.equal(logits(model), before)
    drop_layers(model, [3])
    assert model.config.num_hidden_layers == 3


def test_edits_and_marks_follow_their_layers(tmp_path: Path) -> None:
    model = build("llama")
    structures.remove_others(model, {"model.layers.1.mlp": [0, 3], "model.layers.3.self_attn": [0, 1, 2]})
    compact(model)
    sparsify(model, SparsityConfig(targets=["*.3.mlp.up_proj", "*.1.mlp.up_proj"], sparsity=0.5))
    reference = skipping(model, [0, 1])
    drop_layers(model, [0, 1])
    assert [(kind, name) for kind, name, _ in edits_of(model)] == [("heads", "model.layers.1.self_attn")]
    assert sparse_weights(model) == ("model.layers.1.mlp.up_proj.weight",)
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert sparse_weights(loaded) == sparse_weights(model)


def test_encoder_loses_layers_too() -> None:
    model = structures.build("bert", num_hidden_layers=3)
    drop_layers(model, [1])
    assert model.config.num_hidden_layers == 2
    assert model(**structures.batch("bert")).logits.shape == (3, 2)


# -- importance -----------------------------------------------------------------------------------------------------


def test_block_influence_by_hand() -> None:
    model = build("llama")
    batch = decoders.batch()
    states: dict[str, Tensor] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        states.update(before=inputs[0], after=output if isinstance(output, Tensor) else output[0])

    handle = model.model.layers[2].register_forward_hook(record)
    found = layer_importance(model, [batch])
    handle.remove()
    real = batch["attention_mask"].bool()
    expected = 1 - F.cosine_similarity(states["before"][real], states["after"][real], dim=-1).mean()
    assert found.shape == (4,)
    torch.testing.assert_close(found[2], expected, atol=1e-5, rtol=1e-5)


def test_loss_without_a_layer_is_that_of_the_model_that_skips_it() -> None:
    model = build("qwen2")
    batches = [decoders.batch(0), decoders.batch(1)]

    def loss(model: Any) -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches) / 2

    expected = [loss(skipping(model, [index])) - loss(model) for index in range(4)]
    torch.testing.assert_close(layer_importance(model, batches, "loss"), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_layer_that_does_nothing_goes_first() -> None:
    model = build("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for parameter in model.model.layers[2].get_submodule(name).parameters():
                parameter.zero_()
    before = logits(model)
    assert prune_layers(model, [decoders.batch()], count=1) == [2]
    torch.testing.assert_close(logits(model), before, **CLOSE)


@pytest.mark.parametrize("dropped", [[4], [-1], [0, 0], [0, 1, 2, 3]])
def test_layers_that_it_does_not_have_are_refused(dropped: list[int]) -> None:
    with pytest.raises(RecipeError, match="some of the layers 0 to 3"):
        drop_layers(build("llama"), dropped)


def test_bad_input_is_an_error() -> None:
    model = build("llama")
    with pytest.raises(RecipeError, match=r"`count` must be an integer in \[0, 4\)"):
        prune_layers(model, [decoders.batch()], count=4)
    with pytest.raises(RecipeError, match="`criterion`"):
        layer_importance(model, [decoders.batch()], "entropy")  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match="no batch"):
        layer_importance(model, [])
    with pytest.raises(PatternError, match="one list of transformer layers, and T5ForConditionalGeneration has 2"):
        drop_layers(structures.build("t5"), [0])
    with pytest.raises(PatternError, match="no config"):
        drop_layers(nn.Sequential(nn.ModuleList([nn.TransformerEncoderLayer(8, 2) for _ in range(2)])), [0])
