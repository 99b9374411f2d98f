"""A packed checkpoint loads whatever a dense one does: a part, another head, another class, a config of the user."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    PreTrainedModel,
)

from hf_sparse import CheckpointError, RecipeError, SparsityCallback, SparsityConfig, compact, sparsify, summarize
from hf_sparse import import_checkpoint as convert
from tests.helpers.tiny import config as tiny_config
from tests.helpers.training import bert, sparse_trainer

HALF = SparsityConfig(sparsity=0.5)
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 16,
}


def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 60, "max_position_embeddings": 20}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def keeps_its_zeros(model: Any, **inputs: Any) -> bool:
    """Train two steps with momentum and decay, and return whether every zero is still one."""
    before = summarize(model).nonzeros
    assert summarize(model).weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model.train()(**inputs)
        (output.loss if getattr(output, "loss", None) is not None else output[0].square().mean()).backward()
        optimizer.step()
    return bool(summarize(model).nonzeros == before)


IDS = torch.randint(3, 15, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel])
def test_one_tower_loads_as_from_the_dense_file(kind: Any, tmp_path: Path) -> None:
    model = sparsify(clip(), HALF)
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", format="dense")
    found, expected = kind.from_pretrained(tmp_path / "packed"), kind.from_pretrained(tmp_path / "dense")
    assert_same(found, expected)
    assert summarize(found).sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_tower_keeps_its_zeros_and_packs_again(tmp_path: Path) -> None:
    sparsify(clip(), HALF).save_pretrained(tmp_path / "packed")
    tower: Any = CLIPTextModel.from_pretrained(tmp_path / "packed")
    assert keeps_its_zeros(tower, input_ids=IDS)
    tower.save_pretrained(tmp_path / "tower")
    packed = load_file(tmp_path / "tower" / "model.safetensors")
    assert any(name.endswith("_mask") for name in packed)
    assert_same(CLIPTextModel.from_pretrained(tmp_path / "tower"), tower)


@pytest.mark.parametrize("after", ["pruning", "saving", "loading"])
def test_a_part_that_is_saved_alone_loads_and_keeps_its_zeros(after: str, tmp_path: Path) -> None:
    model: Any = sparsify(bert(), HALF)
    if after != "pruning":
        model.save_pretrained(tmp_path / "packed")
    if after == "loading":
        model = BertForSequenceClassification.from_pretrained(tmp_path / "packed")
    model.bert.save_pretrained(tmp_path / "part")
    part = BertModel.from_pretrained(tmp_path / "part")
    assert_same(part, model.bert)
    assert summarize(part).nonzeros == summarize(model).nonzeros
    assert keeps_its_zeros(part, input_ids=IDS)
    part.save_pretrained(tmp_path / "again")
    assert_same(BertModel.from_pretrained(tmp_path / "again"), part)


def test_a_part_saved_in_training_is_the_masked_one(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5))
    callback: Any = next(each for each in trainer.callback_handler.callbacks if isinstance(each, SparsityCallback))
    callback.pruner.step(1.0)
    trainer.model.bert.save_pretrained(tmp_path / "part")
    part: Any
    information: Any
    part, information = BertModel.from_pretrained(tmp_path / "part", output_loading_info=True)  # type: ignore[misc]
    assert not information["unexpected_keys"]
    assert summarize(part).sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("shares", ["object", "file"])
def test_a_dense_model_with_the_config_of_a_sparse_one_stays_dense(shares: str, tmp_path: Path) -> None:
    config = tiny_config()
    sparse, dense = BertForSequenceClassification(config), BertForSequenceClassification(config)
    sparsify(sparse, HALF).save_pretrained(tmp_path / "sparse")
    if shares == "file":
        dense = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "sparse"))
    dense.save_pretrained(tmp_path / "dense")
    loaded: Any = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert_same(loaded, dense)
    assert not hasattr(loaded.config, "quantization_config")
    assert "save_pretrained" not in vars(loaded)


def test_a_config_of_the_user_loads_a_packed_file(tmp_path: Path) -> None:
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, config=tiny_config())
    assert_same(loaded, model)
    assert summarize(loaded).nonzeros == summarize(model).nonzeros


def test_a_compacted_tower_gets_its_shapes_from_the_file(tmp_path: Path) -> None:
    import hf_sparse

    model: Any = sparsify(bert(), SparsityConfig(pattern="head", sparsity=0.5))
    hf_sparse.compact(model)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path, config=tiny_config())
    assert_same(loaded, model)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_another_head_is_made_anew_and_the_body_keeps_its_zeros(kind: Any, tmp_path: Path) -> None:
    model: Any = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    body = loaded if kind is BertModel else loaded.bert
    assert torch.equal(body.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert summarize(loaded).nonzeros == summarize(model).nonzeros


def test_auto_model_and_a_head_load_from_each_other(tmp_path: Path) -> None:
    model = sparsify(bert(), HALF)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert summarize(again).nonzeros == summarize(model).nonzeros


def test_convert_reads_dense_files_under_the_config_of_a_sparse_model(tmp_path: Path) -> None:
    model: Any = sparsify(bert(), HALF)
    model.bert.save_pretrained(tmp_path / "part")
    done = convert(tmp_path / "part", tmp_path / "packed")
    assert done.kind == "dense"
    assert done.packed == len(summarize(model).weights)
    assert_same(BertModel.from_pretrained(tmp_path / "packed"), model.bert)


def test_packed_files_without_a_manifest_are_no_dense_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    sparsify(bert(), HALF).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no hf_sparse manifest in its header"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no hf_sparse manifest in its header"):
        convert(tmp_path, tmp_path / "converted")
    # Without the config there is no telling, but the shapes are not those of the model.
    with pytest.raises(RuntimeError, match="mismatch"):
        BertForSequenceClassification.from_pretrained(tmp_path, config=tiny_config())


def test_other_models_load_as_if_hf_sparse_were_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = BertModel.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert "save_pretrained" not in vars(loaded)


def compacted() -> Any:
    model = bert()
    sparsify(model, SparsityConfig(sparsity=0.5, pattern="head+neuron"))
    assert compact(model)
    return model.eval()


def test_part_of_a_compacted_model_loads(tmp_path: Path) -> None:
    model = compacted()
    model.bert.save_pretrained(tmp_path / "part")
    assert_same(AutoModel.from_pretrained(tmp_path / "part"), model.bert)
    model.save_pretrained(tmp_path / "whole")
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    loaded.bert.save_pretrained(tmp_path / "part of the loaded")
    assert_same(AutoModel.from_pretrained(tmp_path / "part of the loaded"), model.bert)


class Pair(BertPreTrainedModel):
    """A model of the user around an encoder that lies two modules down."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.towers = torch.nn.ModuleDict({"left": BertModel(config)})
        self.post_init()


def test_model_that_was_made_around_a_compacted_part_loads(tmp_path: Path) -> None:
    model = compacted()
    model.save_pretrained(tmp_path / "whole")
    for name, config in (
        ("plain", tiny_config(num_labels=2)),
        ("stored", BertConfig.from_pretrained(tmp_path / "whole")),
    ):
        around: Any = BertForSequenceClassification(config)
        around.bert = model.bert
        around.save_pretrained(tmp_path / name)
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / name)
        assert_same(loaded, around)
        assert summarize(loaded).sparsity == summarize(model).sparsity
    pair: Any = Pair(tiny_config())
    pair.towers["left"] = model.bert
    pair.save_pretrained(tmp_path / "pair")
    assert_same(Pair.from_pretrained(tmp_path / "pair"), pair)
    with pytest.raises(RecipeError, match="a compacted model cannot be saved dense"):
        pair.save_pretrained(tmp_path / "dense", format="dense")


def test_quantized_model_around_a_compacted_part_is_refused(tmp_path: Path) -> None:
    around: Any = BertForSequenceClassification(tiny_config(num_labels=2))
    around.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    around.bert = compacted().bert
    with pytest.raises(RecipeError, match=r"is quantized \(bitsandbytes\) and has a compacted part"):
        around.save_pretrained(tmp_path / "out")
