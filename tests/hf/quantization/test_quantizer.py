"""from_pretrained: exact or a CheckpointError, never silently wrong."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    Trainer,
)
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from hf_sparse import BackendError, CheckpointError, RecipeError, SparseConfig, SparsityConfig, sparsify, summarize
from hf_sparse.runtime import is_runtime
from tests.helpers.training import Rows, arguments, bert, sparse_trainer

ROOT = Path(__file__).parents[3]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForSequenceClassification, Path]:
    folder = tmp_path_factory.mktemp("packed")
    model = sparsify(bert(), SparsityConfig(sparsity=0.9)).eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def packed(original: tuple[BertForSequenceClassification, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(original[1], tmp_path / "packed")


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


# -- whose wish it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [{"backend": "cpu-int8"}, {"quantization_config": {"load_in_8bit": True}}])
def test_a_file_cannot_ask_for_weights_that_are_not_exact(
    wish: dict[str, Any], packed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_sparse"), "propagate", True)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= wish
    (packed / "config.json").write_text(json.dumps(config))
    loaded = load(packed)
    layer = loaded.bert.encoder.layer[0].attention.self.query
    assert type(layer) is torch.nn.Linear
    assert layer.weight.dtype == torch.float32
    assert f"{next(iter(wish))} in config.json has no effect" in caplog.text


def test_a_mapping_can_wish_what_a_sparse_config_can(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    wish = {"quant_method": "hf_sparse", "sparsity": 0.5, "backend": "csr"}
    assert is_runtime(load(tmp_path, quantization_config=wish))


# -- exact -----------------------------------------------------------------------------------------------------------


def test_loaded_model_is_bit_identical_and_plain(original: tuple[BertForSequenceClassification, Path]) -> None:
    model, folder = original
    loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, expected in model.state_dict().items():
        assert torch.equal(expected, loaded.state_dict()[name]), name
    assert type(loaded.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert summarize(loaded).nonzeros == summarize(model).nonzeros


def test_another_process_computes_the_same_bits(original: tuple[BertForSequenceClassification, Path]) -> None:
    model, folder = original
    code = (
        "import sys, torch, hf_sparse; from transformers import AutoModelForSequenceClassification as A; "
        "from tests.helpers.training import Rows; m = A.from_pretrained(sys.argv[1]); "
        "print(m(input_ids=Rows(4).ids).logits.detach().numpy().tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = model(input_ids=Rows(4).ids).logits.detach().numpy().tobytes().hex()
    assert done.stdout.split()[-1] == expected


def test_without_the_plugin_loading_fails_loudly(original: tuple[BertForSequenceClassification, Path]) -> None:
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A; A.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(original[1])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


def test_base_model_loads_from_a_model_with_a_head(original: tuple[BertForSequenceClassification, Path]) -> None:
    model, folder = original
    base: Any = BertModel.from_pretrained(folder)
    assert torch.equal(base.encoder.layer[0].attention.self.query.weight, model.state_dict()[QUERY])
    assert len(summarize(base).weights) == 12


def test_model_with_a_head_loads_from_a_base_model(tmp_path: Path) -> None:
    base = sparsify(bert().bert, SparsityConfig(sparsity=0.5))
    base.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(
        loaded.bert.encoder.layer[1].output.dense.weight, base.state_dict()["encoder.layer.1.output.dense.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_cast_after_decoding(dtype: torch.dtype, original: tuple[BertForSequenceClassification, Path]) -> None:
    model, folder = original
    loaded = load(folder, dtype=dtype)
    assert torch.equal(loaded.state_dict()[QUERY], model.state_dict()[QUERY].to(dtype))
    assert loaded.classifier.weight.dtype == dtype


def test_loaded_model_trains_in_a_plain_trainer(packed: Path, tmp_path: Path) -> None:
    loaded = load(packed)
    before = loaded.classifier.weight.detach().clone()
    Trainer(loaded, arguments(tmp_path / "runs", max_steps=2), train_dataset=Rows()).train()
    assert not torch.equal(loaded.classifier.weight, before)


def test_loaded_model_can_be_pruned_further(packed: Path, tmp_path: Path) -> None:
    config = SparsityConfig(sparsity=0.95, schedule={"name": "cubic", "begin": 0.1, "end": 0.6, "initial": 0.9})
    trainer = sparse_trainer(tmp_path / "runs", config, load(packed))
    trainer.train()
    trainer.save_model(str(tmp_path / "further"))
    assert summarize(load(tmp_path / "further")).sparsity == pytest.approx(0.95, abs=1e-3)


def test_head_for_another_task_is_made_anew_as_with_a_dense_file(
    original: tuple[BertForSequenceClassification, Path],
) -> None:
    model, folder = original
    loaded = load(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (3, 32)
    assert torch.equal(loaded.state_dict()[QUERY], model.state_dict()[QUERY])
    assert summarize(loaded).nonzeros == summarize(model).nonzeros
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder, num_labels=3)


def test_packed_weight_of_another_shape_is_an_error(packed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has shape \(64, 32\) in the checkpoint, .* has \(128, 32\)"):
        load(packed, intermediate_size=128)


def test_packed_weight_of_another_shape_is_made_anew_on_request_as_with_a_dense_file(packed: Path) -> None:
    loaded = load(packed, intermediate_size=128, ignore_mismatched_sizes=True)
    assert loaded.bert.encoder.layer[0].intermediate.dense.weight.shape == (128, 32)
    assert len(summarize(loaded).weights) == 8, "what is made anew is not sparse"


# -- intent on a dense model -----------------------------------------------------------------------------------------


def test_sparse_config_prunes_a_dense_model_as_it_is_loaded(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "dense")
    config = SparseConfig(sparsity=0.5, scorer="magnitude", pattern="2:4")
    loaded = load(tmp_path / "dense", quantization_config=config)
    weight = loaded.state_dict()[QUERY].view(-1, 4)
    dense = model.state_dict()[QUERY].view(-1, 4)
    top = dense.abs().topk(2, dim=1).indices
    assert torch.equal(weight, torch.zeros_like(dense).scatter_(1, top, dense.gather(1, top)))
    loaded.save_pretrained(tmp_path / "sparse")
    assert torch.equal(load(tmp_path / "sparse").state_dict()[QUERY], loaded.state_dict()[QUERY])


def test_sparse_config_that_asks_for_nothing_is_an_error(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="asks for nothing"):
        load(tmp_path, quantization_config=SparseConfig())


def test_sparse_config_with_a_scorer_that_needs_training_is_an_error(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="scorer 'movement' learns from training"):
        load(tmp_path, quantization_config=SparseConfig(sparsity=0.5, scorer="movement"))


def test_sparse_config_prunes_a_packed_model_further(packed: Path, tmp_path: Path) -> None:
    before = load(packed).state_dict()
    model = load(packed, quantization_config=SparseConfig(sparsity=0.95))
    assert summarize(model).sparsity == pytest.approx(0.95, abs=1e-3)
    weight = model.state_dict()[QUERY]
    kept = before[QUERY].abs().flatten().topk(51).indices  # floor((1 - 0.95) * 1,024)
    assert torch.equal(weight, torch.zeros(1024).index_copy_(0, kept, before[QUERY].flatten()[kept]).view(32, 32))
    model.save_pretrained(tmp_path / "further")
    config = json.loads((tmp_path / "further" / "config.json").read_text())["quantization_config"]
    assert config["intent"] == {"groups": [{"sparsity": 0.95}]}
    assert torch.equal(load(tmp_path / "further").state_dict()[QUERY], weight)


def test_pruning_some_weights_further_leaves_the_others_packed(packed: Path, tmp_path: Path) -> None:
    model = load(packed, quantization_config=SparseConfig(sparsity=0.99, targets="*.query"))
    model.save_pretrained(tmp_path / "further")
    summary = summarize(load(tmp_path / "further"))
    assert [round(weight.sparsity, 2) for weight in summary.weights].count(0.99) == 2
    assert len(summary.weights) == 12


@pytest.mark.parametrize("asked", [{"sparsity": 0.9}, {}])
def test_sparse_config_that_asks_for_what_is_there_changes_nothing(asked: dict[str, Any], packed: Path) -> None:
    model, expected = load(packed, quantization_config=SparseConfig(**asked)), load(packed)
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_config_of_the_caller_is_used_without_a_warning_that_it_is_ignored(packed: Path) -> None:
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        assert is_runtime(load(packed, quantization_config=SparseConfig(backend="csr")))
        assert [str(each.message) for each in raised if "quantization_config" in str(each.message)] == []
        # transformers has the same words for a method of others, and means them.
        stored, given = BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_8bit=True)
        AutoHfQuantizer.merge_quantization_configs(stored, given)
        assert [str(each.message)[:11] for each in raised if "quantization_config" in str(each.message)] == [
            "You passed "
        ]


def test_sparse_config_that_asks_for_less_than_is_there_is_an_error(packed: Path) -> None:
    with pytest.raises(RecipeError, match=r"sparsity 0\.5 was requested, but .* are at 0\.90"):
        load(packed, quantization_config=SparseConfig(sparsity=0.5))


@pytest.mark.parametrize("sizes", [{"tp_size": 2, "tp_plan": "auto"}, {"fsdp_size": 2}])
def test_packed_weights_in_shards_are_refused(sizes: dict[str, Any], packed: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    config.distributed_config = DistributedConfig(**sizes)  # what from_pretrained does with tp_plan
    with pytest.raises(BackendError, match=r"backend 'auto' does not work on a model that is divided over processes"):
        load(packed, config=config, quantization_config=SparseConfig(backend="auto"))


def test_sparse_config_round_trips(original: tuple[BertForSequenceClassification, Path]) -> None:
    data = json.loads((original[1] / "config.json").read_text())["quantization_config"]
    assert SparseConfig.from_dict(data).to_dict() == data
    assert data["intent"] == {"groups": [{"sparsity": 0.9}]}


# -- hostile ---------------------------------------------------------------------------------------------------------


def change_header(folder: Path, change: Callable[[dict[str, Any]], None], also_config: bool = True) -> None:
    """Rewrite the manifest in the file (and in config.json) without touching a tensor."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
        metadata = file.metadata()
    manifest = json.loads(metadata["hf_sparse"])
    change(manifest)
    save_file(tensors, path, metadata={**metadata, "hf_sparse": json.dumps(manifest)})
    if also_config:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["manifest"] = manifest
        (folder / "config.json").write_text(json.dumps(config))


def test_truncated_file_is_an_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors"):
        load(packed)


def test_flipped_bit_anywhere_is_an_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(body, len(whole), (40,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(packed)
    path.write_bytes(whole)
    load(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), r"version 99 .* upgrade"),
        (lambda m: m["tensors"][QUERY].update(shape=[32, 33]), r"tensor .*self\.query\.weight"),
        (lambda m: m["tensors"][QUERY].update(shape=[64, 16]), r"tensor .*self\.query\.weight.*the checksum is"),
        (lambda m: m["tensors"][QUERY].update(nonzeros=101), r"tensor .*self\.query\.weight.*nonzeros"),
        (lambda m: m["tensors"][QUERY].update(checksum="crc32:00000000"), "checksum"),
        (lambda m: m["tensors"][QUERY].update(codec="../../etc"), "codec"),
        (lambda m: m["tensors"].pop(QUERY), "target"),
        (lambda m: (m["tensors"].pop(QUERY), m.update(targets=[])), "does not list"),
        (lambda m: m["tensors"][QUERY].update(shape=[2**40, 2**40]), "larger than"),
    ],
    ids=["newer", "size", "reshaped", "count", "checksum", "codec", "target", "unlisted", "huge"],
)
def test_wrong_manifest_is_an_error(change: Callable[[dict[str, Any]], None], message: str, packed: Path) -> None:
    change_header(packed, change)
    with pytest.raises(CheckpointError, match=message):
        load(packed)


def test_config_of_another_save_warns_and_the_files_are_what_counts(
    original: tuple[BertForSequenceClassification, Path], packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["manifest"]["tensors"][QUERY]["checksum"] = "crc32:00000000"
    (packed / "config.json").write_text(json.dumps(config))
    logging.getLogger("hf_sparse.hf.quantization.quantizer").addHandler(caplog.handler)
    assert torch.equal(load(packed).state_dict()[QUERY], original[0].state_dict()[QUERY])
    assert "config.json describes another save" in caplog.text


def test_shards_of_two_checkpoints_are_an_error(packed: Path, tmp_path: Path) -> None:
    loaded = load(packed)
    loaded.save_pretrained(packed, max_shard_size="8KB")
    with torch.no_grad():
        loaded.classifier.weight.add_(1)
    loaded.save_pretrained(tmp_path / "other", max_shard_size="8KB")
    first = sorted(packed.glob("model-*.safetensors"))[0].name
    shutil.copy(tmp_path / "other" / first, packed / first)
    with pytest.raises(CheckpointError, match="files of two checkpoints"):
        load(packed)


def test_missing_manifest_is_an_error(packed: Path) -> None:
    path = packed / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no hf_sparse manifest"):
        load(packed)


def test_missing_shard_is_an_error(packed: Path) -> None:
    load(packed).save_pretrained(packed, max_shard_size="8KB")
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    lost = index["weight_map"][QUERY]
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != lost}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is a shard missing"):
        load(packed)


@pytest.mark.parametrize("spoilt", [{"intent": "x"}, {"manifest": [1]}])
def test_config_that_holds_something_else_is_refused(spoilt: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"`(intent|manifest)` must be a \w+ or a mapping .*, got ('x'|\[1\])"):
        SparseConfig.from_dict({"quant_method": "hf_sparse", **spoilt})
