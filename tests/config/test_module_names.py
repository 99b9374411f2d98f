"""`target_modules` and `exclude_modules` mean what they mean in PEFT."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest

from hf_sparse import RecipeError, SparsityConfig, sparsify, summarize
from hf_sparse.config.module_names import ModuleNames
from hf_sparse.modeling.layer_matching import match_layers
from tests.helpers.training import bert


def by_peft(model: Any, **names: Any) -> set[str]:
    """Return the layers that PEFT would adapt."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, **names))
    found = {name.removesuffix(".base_layer") for name, _ in adapted.named_modules() if name.endswith(".base_layer")}
    return {name.removeprefix("base_model.model.") for name in found}


@pytest.mark.parametrize(
    "names",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["attention.output.dense"]},
        {"target_modules": r".*\.layer\.0\..*(query|key)"},
        {"target_modules": ["dense"], "exclude_modules": ["output.dense"]},
        {"target_modules": r".*\.dense", "exclude_modules": r".*pooler.*"},
    ],
    ids=str,
)
def test_layers_are_those_of_peft(names: dict[str, Any]) -> None:
    group = SparsityConfig(sparsity=0.5, **names).groups[0]
    assert set(match_layers(bert(), group.target_names, group.exclude_names)) == by_peft(bert(), **names)


def test_all_linear_leaves_out_the_task_head() -> None:
    group = SparsityConfig(sparsity=0.5, target_modules="all-linear").groups[0]
    layers = set(match_layers(bert(), group.target_names))
    expected = by_peft(bert(), target_modules="all-linear", task_type="SEQ_CLS")
    assert layers == expected - {"classifier"}
    assert "bert.pooler.dense" in layers


def test_spelling_survives_json_and_prunes() -> None:
    config = SparsityConfig(sparsity=0.5, target_modules=("query",), exclude_modules="bert.encoder.layer.1.*")
    assert SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["groups"][0]["target_modules"] == ["query"]
    pruned = sparsify(bert(), config.to_dict())
    assert [weight.name for weight in summarize(pruned).weights] == ["bert.encoder.layer.0.attention.self.query.weight"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("(a+)+b", "no repeated group with a repetition in it"),
        ("([a-z]*)*", "no repeated group"),
        ("a" * 1001, "at most 1000 characters"),
        ("(", "is not a regular expression"),
        ([], "list of non-empty strings"),
        (["", "a"], "list of non-empty strings"),
        (5, "`target_modules` must be a regular expression, a list of names or 'all-linear', got 5"),
        ({"a": 1}, "`target_modules` must be"),
    ],
)
def test_other_values_are_refused(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparsityConfig(sparsity=0.5, target_modules=value)


def test_two_spellings_of_the_target_at_once_are_refused() -> None:
    with pytest.raises(RecipeError, match="give `targets` or `target_modules`, not both"):
        SparsityConfig(sparsity=0.5, targets="*", target_modules=["query"])


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="matches no layer"):
        sparsify(bert(), SparsityConfig(sparsity=0.5, target_modules=["quarry"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query", "qurey"]}, r"`target_modules` 'qurey' matches no .* Did you mean 'query'"),
        ({"target_modules": ["*.query"]}, r"`target_modules` '\*\.query' matches no .* Did you mean 'query'"),
        ({"target_modules": "all_linear"}, r"`target_modules` 'all_linear' matches no .* Did you mean 'all-linear'\?"),
        ({"target_modules": "All-Lineer"}, r"Did you mean 'all-linear'\?"),
        (
            {"target_modules": "query"},
            r"`target_modules` 'query' matches no .* Did you mean \['query'\].* A string is a regular expression over",
        ),
        ({"target_modules": "*.query"}, r"'\*\.query' is not a regular expression: .*globs go under `targets`"),
        ({"exclude_modules": ["query", "valeu"]}, r"`exclude_modules` 'valeu' matches no .* Did you mean 'value'"),
        ({"targets": ["*query*", "*qurey*"]}, r"`targets` '\*qurey\*' matches no layer"),
        ({"pattern": "head", "target_modules": ["query", "qurey"]}, r"`target_modules` 'qurey' matches no attention"),
    ],
    ids=str,
)
def test_each_name_of_a_list_has_to_match_and_a_typo_names_the_nearest(options: dict[str, Any], message: str) -> None:
    # PEFT adapts the layers of the other names without a word; here they would be the only ones that are pruned.
    with pytest.raises(RecipeError, match=message):
        sparsify(bert(), SparsityConfig(sparsity=0.5, **options))


def test_suffix_is_a_whole_part_of_a_name() -> None:
    assert not ModuleNames(("uery",)).matches("layer.query")


@pytest.mark.parametrize("config", [None, 0.5, "movement", [1]])
def test_what_is_not_a_config_is_refused(config: Any) -> None:
    with pytest.raises(RecipeError, match="must be a SparsityConfig or a mapping"):
        sparsify(bert(), config)
