"""Loading through accelerate: wherever the weights go, they are the same bits, and saving them again the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map, load_offloaded_parameter
from transformers.modeling_utils import get_total_byte_count

from hf_sparse import CheckpointError, RecipeError, SparseConfig, SparsityConfig, SparsityError, sparsify, summarize
from hf_sparse.hf.quantization.quantizer import SparseQuantizer
from tests.helpers import tiny
from tests.helpers.training import Rows, bert, sparse_trainer

ROOM = 60_000
"""Bytes in which the embeddings of the tiny BERT fit, beside the space that accelerate keeps for its largest layer."""

EXPLICIT = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "disk",
    "bert.encoder.layer.1.attention": "cpu",
    "bert.encoder.layer.1.intermediate": "disk",
    "bert.encoder.layer.1.output.dense": "disk",
    "bert.encoder.layer.1.output.LayerNorm": "cpu",
    "bert.pooler": "cpu",
    "classifier": "disk",
}
PLACES: dict[str, dict[str, Any]] = {
    "auto": {"device_map": "auto"},
    "balanced": {"device_map": "balanced"},
    "auto, little memory": {"device_map": "auto", "max_memory": {"cpu": ROOM}},
    "balanced, little memory": {"device_map": "balanced", "max_memory": {"cpu": ROOM}},
    "sequential, little memory": {"device_map": "sequential", "max_memory": {"cpu": ROOM}},
    "cpu": {"device_map": "cpu"},
    "cpu and disk": {"device_map": EXPLICIT},
    "disk": {"device_map": {"": "disk"}},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
}
OFFLOADED = [place for place in PLACES if "little" in place or "disk" in place]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "packed"
    sparsify(bert(), SparsityConfig(sparsity=0.9)).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def values(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights, also those that are offloaded."""
    state = model.state_dict()
    return {key: load_offloaded_parameter(model, key) if value.is_meta else value for key, value in state.items()}


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    found = values(model)
    assert found.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


# -- the same bits and bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_placed_model_is_the_plain_one(place: str, dtype: torch.dtype, packed: Path, tmp_path: Path) -> None:
    plain = load(packed, dtype=dtype)
    options = dict(PLACES[place])
    if "max_memory" in options:
        options["max_memory"] = {"cpu": ROOM * dtype.itemsize // 4}
    placed = load(packed, dtype=dtype, offload_folder=str(tmp_path / "offload"), **options)
    assert any(parameter.is_meta for parameter in placed.parameters()) == (place in OFFLOADED)
    assert_same(placed, plain)
    ids = Rows(4).ids
    assert torch.equal(placed(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert summarize(placed) == summarize(plain)


@pytest.mark.parametrize("place", PLACES)
def test_saving_a_placed_model_writes_the_same_bytes(place: str, packed: Path, tmp_path: Path) -> None:
    placed = load(packed, offload_folder=str(tmp_path / "offload"), **PLACES[place])
    placed.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(packed)
    placed.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    load(packed).save_pretrained(tmp_path / "plain", max_shard_size="8KB")
    assert len(content(tmp_path / "shards")) > 3
    assert content(tmp_path / "shards") == content(tmp_path / "plain")


@pytest.mark.parametrize("place", ["auto, little memory", "cpu and disk", "disk"])
def test_shards_load_where_they_are_asked_to(place: str, packed: Path, tmp_path: Path) -> None:
    load(packed).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    placed = load(tmp_path / "shards", offload_folder=str(tmp_path / "offload"), **PLACES[place])
    assert_same(placed, load(packed))
    placed.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    assert content(tmp_path / "again") == content(tmp_path / "shards")


def test_offloaded_model_can_be_saved_over_itself(packed: Path, tmp_path: Path) -> None:
    load(packed).save_pretrained(tmp_path / "here")
    placed = load(tmp_path / "here", device_map={"": "disk"}, offload_folder=str(tmp_path / "offload"))
    placed.save_pretrained(tmp_path / "here")
    assert content(tmp_path / "here") == content(packed)
    assert_same(placed, load(packed))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_model_that_accelerate_offloads_after_loading_is_the_same(offload: str, packed: Path, tmp_path: Path) -> None:
    plain, placed = load(packed), load(packed)
    if offload == "cpu":
        cpu_offload(placed, execution_device=torch.device("cpu"))
    else:
        disk_offload(placed, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in placed.parameters())
    ids = Rows(4).ids
    assert torch.equal(placed(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert summarize(placed) == summarize(plain)
    placed.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(packed)


@pytest.mark.parametrize("place", ["cpu and disk", "disk"])
def test_offloaded_model_gives_plain_files(place: str, packed: Path, tmp_path: Path) -> None:
    plain = load(packed)
    placed = load(packed, offload_folder=str(tmp_path / "offload"), **PLACES[place])
    plain.save_pretrained(tmp_path / "dense", format="dense")
    placed.save_pretrained(tmp_path / "offloaded", format="dense")
    assert content(tmp_path / "offloaded") == content(tmp_path / "dense")
    placed.dequantize()
    placed.save_pretrained(tmp_path / "dequantized")
    assert content(tmp_path / "dequantized") == content(tmp_path / "dense")


def tied_bert() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(tiny.config())


def tied_t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50))


@pytest.mark.parametrize("make", [tied_bert, tied_t5])
def test_tied_weights_survive_offloading(make: Any, tmp_path: Path) -> None:
    sparsify(make(), SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "packed")
    kind = type(make())
    plain = kind.from_pretrained(tmp_path / "packed")
    placed = kind.from_pretrained(
        tmp_path / "packed", device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    ids = torch.tensor([[1, 2, 3]])
    inputs = {"decoder_input_ids": ids} if kind is T5ForConditionalGeneration else {}
    assert torch.equal(placed(ids, **inputs).logits, plain(ids, **inputs).logits)
    placed.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "packed")


def test_damaged_weight_is_an_error_where_it_would_be_offloaded(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "damaged")
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    key = "bert.encoder.layer.1.output.dense.weight"
    whole[start + json.loads(whole[8:start])[key]["data_offsets"][0]] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=key):
        load(folder, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload"))


def test_weights_that_stay_in_fp32_do_so(tmp_path: Path) -> None:
    model = sparsify(tied_t5(), SparsityConfig(sparsity=0.5))
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", format="dense")
    plain, found = (
        T5ForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float16) for name in ("dense", "packed")
    )
    assert_same(found, plain)
    assert found.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight").dtype == torch.float32
    assert found.get_parameter("encoder.block.0.layer.1.DenseReluDense.wi.weight").dtype == torch.float16


# -- honest sizes ----------------------------------------------------------------------------------------------------


def planned(folder: Path, dtype: torch.dtype) -> tuple[Any, SparseQuantizer]:
    """The model on the meta device and the quantizer, as from_pretrained has them when it plans."""
    config = AutoConfig.from_pretrained(folder)
    quantizer = SparseQuantizer(SparseConfig.from_dict(config.quantization_config), pre_quantized=True)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype), quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planner_sees_decoded_sizes(dtype: torch.dtype, packed: Path) -> None:
    model, quantizer = planned(packed, dtype)
    query = "bert.encoder.layer.0.attention.self.query"
    sizes, leaves = compute_module_sizes(model, quantizer)
    assert leaves[query] == (32 * 32 + 32) * dtype.itemsize
    parameters = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    assert sizes[""] == parameters + sum(buffer.nbytes for buffer in model.buffers())
    devices = dict.fromkeys(dict(model.named_parameters()), torch.device("cuda:0"))
    assert dict(get_total_byte_count(model, devices, quantizer)) == {torch.device("cuda:0"): parameters}
    for room in (0, ROOM // 2, ROOM, 10 * ROOM):
        dense_plan = infer_auto_device_map(model, max_memory={"cpu": room})
        assert infer_auto_device_map(model, max_memory={"cpu": room}, hf_quantizer=quantizer) == dense_plan


def test_plan_of_a_packed_model_is_that_of_the_dense_one(packed: Path, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "dense")
    options = {"device_map": "auto", "max_memory": {"cpu": ROOM}, "offload_folder": str(tmp_path / "offload")}
    assert load(packed, **options).hf_device_map == load(tmp_path / "dense", **options).hf_device_map


# -- training and reporting ------------------------------------------------------------------------------------------


def test_training_an_offloaded_layer_is_an_error(packed: Path, tmp_path: Path) -> None:
    placed = load(packed, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload"))
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(RecipeError, match="offloaded cannot train"):
        placed.train()(input_ids=Rows(4).ids, labels=labels)
    with torch.no_grad():  # dropout for its own sake is fine
        placed(input_ids=Rows(4).ids)


def test_pruning_an_offloaded_model_is_an_error(packed: Path, tmp_path: Path) -> None:
    placed = load(packed, device_map={"": "disk"}, offload_folder=str(tmp_path / "offload"))
    with pytest.raises(RecipeError, match="meta device"):
        sparse_trainer(tmp_path, model=placed)


def test_dispatched_model_trains_and_keeps_its_zeros(packed: Path, tmp_path: Path) -> None:
    """Two places, but nothing offloaded that is sparse: what has no gradient is the business of accelerate."""
    places = {"bert": "cpu", "classifier": "disk"}
    placed = load(packed, device_map=places, offload_folder=str(tmp_path / "offload")).train()
    weight = placed.bert.encoder.layer[0].output.dense.weight
    before, expected = weight.detach().clone(), summarize(placed).nonzeros
    optimizer = torch.optim.AdamW([p for p in placed.parameters() if not p.is_meta], lr=0.01, weight_decay=0.1)
    for _ in range(2):
        placed(input_ids=Rows(4).ids, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
        optimizer.step()
    assert not torch.equal(weight, before)
    assert summarize(placed).nonzeros == expected


def test_summary_of_a_model_without_values_is_an_error(packed: Path) -> None:
    model, _ = planned(packed, torch.float32)
    with pytest.raises(SparsityError, match="meta device"):
        summarize(model)
