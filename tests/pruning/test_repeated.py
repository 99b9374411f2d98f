"""Prunings one after the other: all are remembered, packed, guarded in training and in the summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_sparse import Pruner, SparsityConfig, compact, sparsify, summarize
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.model_state import sparse_weights
from tests.helpers.training import RAMP, Rows, bert, sparse_trainer

ATTENTION = SparsityConfig(targets="*attention*", sparsity=0.75)
FEED_FORWARD = SparsityConfig(targets="*.intermediate.*", sparsity=0.5)


def with_sparsify(model: Any, config: SparsityConfig, folder: Path) -> Any:
    return sparsify(model, config)


def with_callback(model: Any, config: SparsityConfig, folder: Path) -> Any:
    group = {**config.groups[0].to_dict(), "schedule": RAMP}
    sparse_trainer(folder / "run", SparsityConfig(**group), model=model, max_steps=8).train()
    return model


def with_pruner(model: Any, config: SparsityConfig, folder: Path) -> Any:
    pruner = Pruner(model, config).attach()
    pruner.step(1.0)
    return pruner.bake()


def saved_and_loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "saved")
    return BertForSequenceClassification.from_pretrained(folder / "saved")


def train(model: Any, steps: int = 3) -> None:
    rows = [Rows(8)[index] for index in range(8)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def zeros(model: Any) -> dict[str, int]:
    return {name: int((model.get_parameter(name) == 0).sum()) for name in sparse_weights(model)}


Method = Callable[[Any, SparsityConfig, Path], Any]


@pytest.mark.parametrize(
    ("first", "second", "between"),
    [
        (with_sparsify, with_sparsify, "nothing"),
        (with_sparsify, with_callback, "load"),
        (with_callback, with_sparsify, "nothing"),
        (with_pruner, with_pruner, "compact"),
        (with_callback, with_callback, "compact"),
        (with_sparsify, with_pruner, "load"),
    ],
)
def test_pruning_of_other_layers_forgets_no_earlier_one(
    tmp_path: Path, first: Method, second: Method, between: str
) -> None:
    model = first(bert(), ATTENTION, tmp_path)
    if between == "load":
        model = saved_and_loaded(model, tmp_path)
    if between == "compact":
        compact(model)  # nothing is empty, so nothing goes
    before = zeros(model)
    model = second(model, FEED_FORWARD, tmp_path)
    assert len(sparse_weights(model)) == 10
    assert before.items() <= zeros(model).items()
    assert {round(weight.sparsity, 2) for weight in summarize(model).weights} == {0.5, 0.75}
    loaded = saved_and_loaded(model, tmp_path)
    assert zeros(loaded) == zeros(model)
    assert summarize(loaded) == summarize(model)
    assert [entry.name for entry in inspect(tmp_path / "saved").tensors if entry.targeted] == sorted(zeros(model))
    groups = loaded.config.quantization_config.intent.groups
    assert [group.sparsity for group in groups] == [0.75, 0.5]
    train(loaded)
    assert zeros(loaded) == zeros(model)


def test_elements_after_heads_and_heads_after_elements_keep_both(tmp_path: Path) -> None:
    heads, elements = SparsityConfig(pattern="head", sparsity=0.5), SparsityConfig(sparsity=0.6)
    for order in ((heads, elements), (elements, heads)):
        model = bert()
        for config in order:
            sparsify(model, config)
        assert len(sparse_weights(model)) == 12
        loaded = saved_and_loaded(model, tmp_path)
        assert zeros(loaded) == zeros(model)
        train(loaded)
        assert zeros(loaded) == zeros(model)
        assert all(len(cut.kept) == 2 for kind, _, cut in compact(loaded) if kind == "heads")


def test_same_weights_again_are_one_request_and_some_of_them_are_taken_out_of_the_earlier_one(tmp_path: Path) -> None:
    model = sparsify(bert(), SparsityConfig(targets="*attention*", sparsity=0.5))
    sparsify(model, SparsityConfig(targets="*attention*", sparsity=0.75))
    assert [group.sparsity for group in model.config.quantization_config.intent.groups] == [0.75]
    sparsify(model, SparsityConfig(targets="*.query", sparsity=0.9))
    first, second = model.config.quantization_config.intent.groups
    assert first.exclude == tuple(f"bert.encoder.layer.{i}.attention.self.query" for i in range(2))
    assert (first.sparsity, second.sparsity) == (0.75, 0.9)
    again = sparsify(bert(), model.config.quantization_config.intent)  # what is remembered can be requested
    assert [w.nonzeros for w in summarize(again).weights] == [w.nonzeros for w in summarize(model).weights]


def test_parts_that_were_pruned_by_themselves_belong_to_the_whole(tmp_path: Path) -> None:
    model = bert()
    sparsify(model.bert, ATTENTION)
    sparsify(model, FEED_FORWARD)
    assert len(sparse_weights(model)) == 10
    assert zeros(saved_and_loaded(model, tmp_path)) == zeros(model)


def test_run_after_a_pruning_resumes_with_both(tmp_path: Path) -> None:
    def trainer(folder: Path) -> Any:
        config = SparsityConfig(targets="*.intermediate.*", sparsity=0.5, schedule=RAMP)
        return sparse_trainer(folder, config, sparsify(bert(), ATTENTION), save_strategy="steps", save_steps=10)

    whole, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert zeros(resumed.model) == zeros(whole.model)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
