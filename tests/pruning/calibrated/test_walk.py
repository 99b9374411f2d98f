"""Block by block through real architectures, against running the whole model from its beginning for every block."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM
from transformers.pytorch_utils import Conv1D

from hf_sparse import RecipeError, SparsityConfig, SparsityError, layer_importance, sparsify
from hf_sparse.modeling.class_swap import Swapped
from hf_sparse.pruning.calibrated.recording import record
from hf_sparse.pruning.calibrated.tasks import LayerUpdate
from hf_sparse.pruning.calibrated.walk import ChainStep, Walk
from tests.helpers import oneshot

MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (oneshot.llama, [f"model.layers.{i}" for i in range(3)]),
    "gemma": (oneshot.gemma, [f"model.layers.{i}" for i in range(4)]),
    "gpt2": (oneshot.gpt2, [f"transformer.h.{i}" for i in range(2)]),
    "bert": (oneshot.bert, [f"bert.encoder.layer.{i}" for i in range(2)]),
    "t5": (oneshot.t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
}


def batches_for(name: str) -> list[dict[str, Tensor]]:
    batches = oneshot.token_batches()
    return (
        [{**batch, "labels": batch["input_ids"][:, :7].contiguous()} for batch in batches] if name == "t5" else batches
    )


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@pytest.mark.parametrize("scorer", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", list(MODELS))
def test_blocks_are_pruned_as_if_the_model_ran_from_its_beginning_for_each(name: str, scorer: str) -> None:
    build, blocks = MODELS[name]
    model, batches = build(), batches_for(name)
    expected = copy.deepcopy(model)
    formula = getattr(oneshot, scorer)
    oneshot.block_by_block(expected, blocks, batches, lambda weight, x: formula(weight, x, 0.5), is_layer)
    sparsify(model, SparsityConfig(scorer=scorer, sparsity=0.5), batches)
    for key, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key] != 0, weight != 0), key
        torch.testing.assert_close(model.state_dict()[key], weight, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", list(MODELS))
def test_families_run_each_block_alone(name: str) -> None:
    """The other way, from the beginning each time, gives the same masks for much more work."""
    build, blocks = MODELS[name]
    model = build()
    layers = [key for key, module in model.named_modules() if is_layer(module) and key.startswith(tuple(blocks))]
    walk = Walk(model, batches_for(name), layers)
    found = []
    for step in walk.steps():
        assert isinstance(step, ChainStep)
        found.append(step.name)
        step.advance()
    assert found == blocks
    assert walk.count == len(blocks)


def test_each_block_is_called_with_its_own_arguments() -> None:
    """Sliding and full layers have other masks and rotary embeddings."""
    model = oneshot.gemma()
    recording = record(model, list(model.model.layers), oneshot.token_batches())
    assert recording is not None
    sliding, full = (recording.calls[index][0].kwargs for index in (0, 1))
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])
    assert sliding["attention_mask"] is not None
    # Equal arguments of all batches are one object, or masks would take more memory than hidden states.
    assert recording.calls[0][1].kwargs["attention_mask"] is sliding["attention_mask"]
    assert not {"forward", "recorder"} & set(vars(model.model.layers[0]))
    assert not isinstance(model.model.layers[0], Swapped)


def test_padding_does_not_count() -> None:
    batch = oneshot.token_batches(1, size=1)[0]["input_ids"]
    padded = torch.cat([batch, torch.full((1, 5), 49)], dim=1)
    mask = torch.cat([torch.ones_like(batch), torch.zeros(1, 5, dtype=torch.long)], dim=1)
    models = [oneshot.bert(), oneshot.bert()]
    sparsify(models[0], SparsityConfig(scorer="sparsegpt", sparsity=0.5), [{"input_ids": batch}])
    batches = [{"input_ids": padded, "attention_mask": mask}]
    sparsify(models[1], SparsityConfig(scorer="sparsegpt", sparsity=0.5), batches)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


class Scaled(nn.Module):
    """A model that works on hidden states between its blocks, so that they cannot run alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x * 0.5)
        return self.head(x)


def test_model_that_works_between_its_blocks_runs_from_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = Scaled().double(), [{"x": torch.randn(30, 16, dtype=torch.float64)} for _ in range(2)]
    expected = copy.deepcopy(model)
    oneshot.block_by_block(
        expected, ["layers.0", "layers.1", "layers.2", "head"], batches,
        lambda weight, x: oneshot.sparsegpt(weight, x, 0.5), is_layer,
    )  # fmt: skip
    sparsify(model, SparsityConfig(targets="*", scorer="sparsegpt", sparsity=0.5), batches)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert "the model runs from its beginning for each of them" in caplog.text


def test_block_that_is_called_several_times_is_calibrated_with_all_its_calls() -> None:
    """ALBERT has one layer, which runs as often as others have layers."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=50, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4,
    )  # fmt: skip
    model = AlbertForMaskedLM(config).double().eval()
    expected, block = copy.deepcopy(model), "albert.encoder.albert_layer_groups.0.albert_layers.0"
    oneshot.block_by_block(
        expected, [block], oneshot.token_batches(), lambda weight, x: oneshot.sparsegpt(weight, x, 0.5), is_layer
    )
    sparsify(model, SparsityConfig(scorer="sparsegpt", sparsity=0.5), oneshot.token_batches())
    for key, weight in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], weight, rtol=1e-8, atol=1e-9)


def test_layers_with_one_input_share_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparse.pruning.calibrated import statistics

    made: list[int] = []
    plain = statistics.InputStatistics.__init__

    def counted(self: Any, columns: int, *args: Any) -> None:
        made.append(columns)
        plain(self, columns, *args)

    monkeypatch.setattr(statistics.InputStatistics, "__init__", counted)
    sparsify(oneshot.llama(num_hidden_layers=1), SparsityConfig(scorer="sparsegpt", sparsity=0.5), batches_for("llama"))
    assert made == [32, 32, 32, 48]  # q, k and v; o; gate and up; down


def test_what_was_done_to_each_layer_is_reported() -> None:
    updates: dict[str, list[LayerUpdate]] = {}
    for scorer in ("wanda", "sparsegpt"):
        model = oneshot.llama()
        config, updates[scorer] = SparsityConfig(scorer=scorer, sparsity=0.5), []
        sparsify(model, config, batches_for("llama"), on_layer=updates[scorer].append)
    assert len(updates["wanda"]) == len(updates["sparsegpt"]) == 21
    for wanda, gpt in zip(updates["wanda"], updates["sparsegpt"], strict=True):
        assert wanda.name == gpt.name
        assert wanda.sparsity == pytest.approx(0.5, abs=0.02)
        assert (wanda.change, wanda.error) == (0.0, None)
        assert gpt.change > 0
        assert gpt.error is not None
        assert 0 < gpt.error < 1
    assert dataclasses.asdict(updates["wanda"][0])["name"] == "model.layers.0.self_attn.q_proj"


def test_model_is_left_in_the_mode_it_was_in() -> None:
    model = oneshot.llama()
    model.train()
    model.model.layers[0].eval()
    sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.5), batches_for("llama"))
    assert model.training
    assert [layer.training for layer in model.model.layers] == [False, True, True]
    assert model.model.layers[1].mlp.up_proj.training


def test_layer_without_inputs_is_named() -> None:
    model = oneshot.t5()
    batches = [{"input_ids": batch["input_ids"]} for batch in oneshot.token_batches()]
    with pytest.raises((SparsityError, ValueError)):
        sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.5), batches)
    scaled = Scaled()
    scaled.unused = nn.Linear(16, 4)
    with pytest.raises(SparsityError, match=r"'unused' took no part in the forward passes over the calibration batch"):
        sparsify(scaled, SparsityConfig(targets="*", scorer="wanda", sparsity=0.5), [{"x": torch.randn(3, 16)}])


def test_inputs_that_are_not_finite_are_named() -> None:
    model = oneshot.llama()
    model.model.embed_tokens.weight.data[7] = float("nan")
    with pytest.raises(SparsityError, match=r"the inputs of 'model\.layers\.0\.self_attn\.q_proj' .* are not finite"):
        sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.5), batches_for("llama"))


@pytest.mark.parametrize("scorer", ["wanda", "sparsegpt"])
def test_requests_that_cannot_be_met_are_refused_before_anything_changes(scorer: str) -> None:
    model, batches = oneshot.llama(), batches_for("llama")
    before = copy.deepcopy(model.state_dict())

    def refused(kind: type[Exception], message: str, given: Any = batches, **group: Any) -> None:
        with pytest.raises(kind, match=message):
            sparsify(model, SparsityConfig(**{"scorer": scorer, "sparsity": 0.5, **group}), given)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    refused(RecipeError, f"scorer '{scorer}' prunes block by block, so weights cannot compete", selection="global")
    refused(RecipeError, "does not work with pattern 'row'", pattern="row")
    refused(RecipeError, f"scorer '{scorer}' looks at data", given=None)
    refused(SparsityError, "there was no batch", given=[])
    refused(
        RecipeError, "a reconstruction looks at the inputs of layers", None, scorer="magnitude", reconstruction="cg"
    )
    refused(RecipeError, "'owl' looks at the inputs of layers", None, scorer="magnitude", selection="owl")


def test_training_with_scorers_of_one_shot_is_refused() -> None:
    from hf_sparse import Pruner

    for group in ({"scorer": "wanda"}, {"selection": "owl"}, {"reconstruction": "cg"}):
        with pytest.raises(RecipeError, match="looks at the inputs of layers and prunes in one shot"):
            Pruner(oneshot.llama(), SparsityConfig(sparsity=0.5, **group)).attach()  # type: ignore[arg-type]


def test_pruning_again_never_restores_weights() -> None:
    model, batches = oneshot.llama(), batches_for("llama")
    sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.75), batches)
    with pytest.raises(RecipeError, match=r"are at 0\.7[0-9]* since an earlier pruning"):
        sparsify(model, SparsityConfig(scorer="sparsegpt", sparsity=0.5), batches)
    sparsify(model, SparsityConfig(scorer="sparsegpt", sparsity=0.9), batches)
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).double().mean()) == pytest.approx(0.9, abs=0.01)


def test_owl_keeps_blocks_with_outliers_denser_and_the_total() -> None:
    model, batches = oneshot.llama(), batches_for("llama")
    for layer in (model.model.layers[2].mlp.gate_proj, model.model.layers[2].self_attn.q_proj):
        layer.weight.data[:, :2] *= 30  # outliers
    sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.6, selection={"name": "owl", "spread": 0.1}), batches)
    sparsity = [
        float(torch.cat([m.weight.flatten() for m in block.modules() if is_layer(m)]).eq(0).double().mean())
        for block in model.model.layers
    ]
    assert sum(sparsity) / 3 == pytest.approx(0.6, abs=0.015)
    assert max(sparsity) - min(sparsity) == pytest.approx(0.2, abs=0.03)
    assert sparsity[2] == min(sparsity)


def test_masks_of_several_groups_and_of_heads_are_reconstructed() -> None:
    model: Any = oneshot.bert()
    groups: list[Any] = [
        {"pattern": "head", "sparsity": 0.5, "reconstruction": "cg"},
        {"targets": "*.intermediate.dense", "scorer": "sparsegpt", "pattern": "2:4"},
        {"targets": "bert.encoder.layer.?.output.dense", "sparsity": 0.5, "selection": "global"},
    ]
    dense = copy.deepcopy(model)
    sparsify(model, SparsityConfig(groups=groups), oneshot.token_batches())
    output = model.bert.encoder.layer[0].attention.output.dense.weight
    kept = (output != 0).any(0).view(4, 8).all(1)
    assert int(kept.sum()) == 2
    columns = kept.repeat_interleave(8)
    assert not torch.equal(output[:, columns], dense.bert.encoder.layer[0].attention.output.dense.weight[:, columns])
    assert (model.bert.encoder.layer[1].intermediate.dense.weight != 0).view(-1, 4).sum(1).eq(2).all()
    query = model.bert.encoder.layer[0].attention.self.query
    assert torch.equal(query.weight.eq(0).all(1), ~columns)
    assert torch.equal(query.bias[columns], dense.bert.encoder.layer[0].attention.self.query.bias[columns])


def test_padding_alone_and_a_decoder_without_inputs_are_named() -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(SparsityError, match=r"every token that .*q_proj' was given is padding"):
        sparsify(oneshot.llama(), {"scorer": "wanda", "sparsity": 0.5}, [batch])
    with pytest.raises(SparsityError, match=r"every token of the batches is padding, so the importance of layers"):
        layer_importance(oneshot.llama(), [batch])
    with pytest.raises(SparsityError, match=r"the batches have input_ids: add `labels` or `decoder_input_ids`"):
        sparsify(oneshot.t5(), {"scorer": "wanda", "sparsity": 0.5}, [{"input_ids": batch["input_ids"]}])
