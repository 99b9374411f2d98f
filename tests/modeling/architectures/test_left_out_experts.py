"""Patterns of neurons on mixtures of experts: what is left out is named, with its share."""

from __future__ import annotations

import re

import pytest

from hf_sparse import RecipeError, sparsify
from tests.helpers import decoders

EXPERTS = (
    r"experts in 2 mixtures \(\d\d\.\d% of the model's parameters\) are not pruned by patterns: whole experts leave"
)


@pytest.mark.parametrize(("family", "pattern"), [("mixtral", "kv_head+neuron"), ("qwen2-moe", "neuron")])
def test_experts_are_named_once(family: str, pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    sparsify(decoders.build(family), {"pattern": pattern, "sparsity": 0.5})
    found = [record.getMessage() for record in caplog.records if "leaves something out" in record.getMessage()]
    assert len(found) == 1
    assert f"pattern {pattern} leaves" in found[0]
    assert re.search(EXPERTS, found[0])


def test_heads_and_dense_models_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sparsify(decoders.build("mixtral"), {"pattern": "head", "sparsity": 0.5})
    sparsify(decoders.build("llama"), {"pattern": "neuron", "sparsity": 0.5})
    assert "leaves something out" not in caplog.text


def test_a_model_with_experts_alone_says_what_its_neurons_are() -> None:
    with pytest.raises(
        RecipeError, match=rf"pattern neuron finds no feed_forward in this MixtralForCausalLM\. .*{EXPERTS}"
    ):
        sparsify(decoders.build("mixtral"), {"pattern": "neuron", "sparsity": 0.5})
