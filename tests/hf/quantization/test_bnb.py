"""A packed checkpoint quantized by bitsandbytes while it is loaded: the same model as from the dense one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig, GPTQConfig, Trainer
from transformers.integrations.accelerate import compute_module_sizes
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from hf_sparse import (
    CheckpointError,
    RecipeError,
    SparseConfig,
    SparsityConfig,
    SparsityError,
    compact,
    sparsify,
    summarize,
)
from hf_sparse.hf.quantization.quantizer import SparseQuantizer
from tests.helpers.training import Rows, arguments, bert

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8, skipping": {"load_in_8bit": True, "llm_int8_skip_modules": ["classifier", "pooler", "query"]},
}
LAYER = "bert.encoder.layer.1.output.dense"


def second(name: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**CONFIGS[name])


def load(folder: Path, config: Any = None, **options: Any) -> Any:
    if config is not None:  # None would count as one, and take away that of the checkpoint
        options["quantization_config"] = config
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same sparse model, packed and dense."""
    folder = tmp_path_factory.mktemp("bitsandbytes")
    model = sparsify(bert(), SparsityConfig(sparsity=0.9))
    model.save_pretrained(folder / "packed")
    model.save_pretrained(folder / "dense", format="dense")
    return folder / "packed", folder / "dense"


def assert_same(found: Any, expected: Any) -> None:
    """Compare all that the two models hold: weights, scales, quantization maps, formats."""
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_checkpoint_quantizes_to_what_the_dense_one_does(
    name: str, dtype: torch.dtype, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    found = load(folders[0], SparseConfig(quantization_config=second(name)), dtype=dtype)
    expected = load(folders[1], second(name), dtype=dtype)
    assert_same(found, expected)
    assert type(found.hf_quantizer) is type(expected.hf_quantizer)
    # Saved, it is a checkpoint of bitsandbytes, byte for byte, that loads without hf_sparse.
    found.save_pretrained(tmp_path / "found")
    expected.save_pretrained(tmp_path / "expected")
    assert content(tmp_path / "found") == content(tmp_path / "expected")
    assert_same(load(tmp_path / "found"), found)
    ids = Rows(4).ids  # last, because bitsandbytes casts biases in its forward pass
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "auto", "max_memory": {"cpu": 60_000}}])
def test_device_map_is_that_of_bitsandbytes(
    options: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    found = load(
        folders[0], SparseConfig(quantization_config=second("nf4")), offload_folder=str(tmp_path / "found"), **options
    )
    expected = load(folders[1], second("nf4"), offload_folder=str(tmp_path / "expected"), **options)
    assert getattr(found, "hf_device_map", None) == getattr(expected, "hf_device_map", None)
    assert_same(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_zeros_are_zeros_after_dequantization(name: str, folders: tuple[Path, Path]) -> None:
    sparse = load(folders[0]).state_dict()
    model = load(folders[0], SparseConfig(quantization_config=second(name)))
    quantized = {"Linear8bitLt": 0, "Linear4bit": 0, "Linear": 0}
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{layer}.weight" in model.hf_sparse_weights:
            quantized[type(module).__name__] += 1
            weight = dequantize_bnb_weight(cast(Any, module.weight), getattr(module, "state", None))
            zeros = sparse[f"{layer}.weight"] == 0
            assert zeros.float().mean() > 0.89
            assert torch.all(weight[zeros] == 0), layer
            assert torch.count_nonzero(weight) > 0.5 * torch.count_nonzero(~zeros), layer
    assert quantized["Linear"] == (2 if "skipping" in name else 0)
    assert sum(quantized.values()) == 12


def test_dequantized_model_has_the_zeros(folders: tuple[Path, Path]) -> None:
    sparse = load(folders[0])
    model = load(folders[0], SparseConfig(quantization_config=second("nf4"))).dequantize(torch.float32)
    weight = model.get_submodule(LAYER).weight
    assert torch.all(weight[sparse.get_submodule(LAYER).weight == 0] == 0)
    assert summarize(model).sparsity >= summarize(sparse).sparsity


def test_summary_counts_int8_and_refuses_4_bits(folders: tuple[Path, Path]) -> None:
    sparse = summarize(load(folders[0]))
    int8 = summarize(load(folders[0], SparseConfig(quantization_config=second("int8"))))
    assert int8.sparsity >= sparse.sparsity  # the smallest weights round to zero
    assert int8.dense_bytes == sparse.dense_bytes // 4
    with pytest.raises(SparsityError, match=r"is quantized: .*dequantize"):
        summarize(load(folders[0], SparseConfig(quantization_config=second("nf4"))))


@pytest.mark.parametrize(("name", "bytes_each"), [("int8", 1.0), ("nf4", 0.5)])
def test_planner_sees_quantized_sizes(name: str, bytes_each: float, folders: tuple[Path, Path]) -> None:
    config = AutoConfig.from_pretrained(folders[0])
    sparse = SparseConfig.from_dict(config.quantization_config)
    sparse.quantization_config = second(name)
    quantizer = SparseQuantizer(sparse, pre_quantized=True)
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config)
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    _, leaves = compute_module_sizes(model, quantizer)
    assert leaves[LAYER] == 32 * 64 * bytes_each + 32 * 4
    assert leaves["bert.embeddings.position_embeddings"] == 16 * 32 * 4


def test_damaged_file_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "damaged")
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    whole[8 + int.from_bytes(whole[:8], "little") + header[f"{LAYER}.weight"]["data_offsets"][0]] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=LAYER):
        load(folder, SparseConfig(quantization_config=second("nf4")))


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_quantized_model_cannot_be_pruned_or_trained(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(folders[0], SparseConfig(quantization_config=second(name)))
    with pytest.raises(RecipeError, match=r"is quantized .* Load the model without quantization"):
        sparsify(model, SparsityConfig(sparsity=0.95))
    with pytest.raises(ValueError, match="quantized"):  # what transformers says of every quantized model
        Trainer(model, arguments(tmp_path), train_dataset=Rows())


@pytest.mark.parametrize("which", ["packed", "dense", "never sparse"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pruning_and_quantizing_in_one_load_is_one_after_the_other(
    name: str, which: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    start = {"packed": folders[0], "dense": folders[1], "never sparse": tmp_path / "start"}[which]
    if which == "never sparse":
        bert().save_pretrained(start)
    load(start, SparseConfig(sparsity=0.95)).save_pretrained(tmp_path / "pruned", format="dense")
    expected = load(tmp_path / "pruned", second(name))
    found = load(start, SparseConfig(sparsity=0.95, quantization_config=second(name)))
    assert_same(found, expected)
    assert not any(module.training for module in found.modules())
    found.save_pretrained(tmp_path / "found")
    expected.save_pretrained(tmp_path / "expected")
    assert content(tmp_path / "found") == content(tmp_path / "expected")
    assert_same(load(tmp_path / "found"), found)
    ids = Rows(4).ids
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_pruning_and_quantizing_over_several_devices_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = SparseConfig(
        sparsity=0.95, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    )
    places = {"bert": "cpu", "classifier": "disk"}
    with pytest.raises(RecipeError, match="needs the whole model on one device"):
        load(folders[1], config, device_map=places, offload_folder=str(tmp_path))


def test_second_quantization_by_others_is_refused() -> None:
    with pytest.raises(RecipeError, match="is a BitsAndBytesConfig, not GPTQConfig"):
        SparseConfig(quantization_config=GPTQConfig(bits=4))  # type: ignore[arg-type]


def test_config_with_a_second_quantization_round_trips() -> None:
    config = SparseConfig(sparsity=0.5, quantization_config=second("nf4, double"))
    data = json.loads(json.dumps(config.to_dict()))
    assert SparseConfig.from_dict(data).to_dict() == data
    assert data["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"


def test_compacted_model_is_quantized_in_its_own_sizes_and_refuses_to_be_saved_so(tmp_path: Path) -> None:
    groups = [{"pattern": "head", "sparsity": 0.5}, {"pattern": "neuron", "sparsity": 0.5}]
    model = sparsify(bert(), SparsityConfig(groups=groups)).eval()
    compact(model)
    model.save_pretrained(tmp_path / "uneven")
    config = SparseConfig(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "uneven", quantization_config=config)
    query = loaded.bert.encoder.layer[0].attention.self.query
    assert query.weight.dtype == torch.int8
    assert query.weight.shape == (16, 32)  # two of four heads
    ids = Rows(4).ids
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits.float(), model(ids).logits, atol=0.05, rtol=0)
    with pytest.raises(RecipeError, match="compacted model that bitsandbytes has quantized cannot be saved"):
        loaded.save_pretrained(tmp_path / "quantized")
