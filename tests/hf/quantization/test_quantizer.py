"""from_pretrained: exact or a CheckpointError, never silently wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    Trainer,
)
from transformers.quantizers.auto import AutoHfQuantizer

from hf_sparse import CheckpointError, RecipeError, SparseConfig, SparsityConfig, sparsify, summarize
from hf_sparse.runtime import is_runtime
from tests.helpers.training import Rows, arguments, bert, sparse_trainer
from tests.hf.quantization.packed_bert import QUERY, load

ROOT = Path(__file__).parents[3]


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


def test_sparse_config_round_trips(original: tuple[BertForSequenceClassification, Path]) -> None:
    data = json.loads((original[1] / "config.json").read_text())["quantization_config"]
    assert SparseConfig.from_dict(data).to_dict() == data
    assert data["intent"] == {"groups": [{"sparsity": 0.9}]}
