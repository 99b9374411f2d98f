"""Adapters of PEFT on a sparse base: they train, and merging them keeps the zeros and says what that cost."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, Trainer
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_sparse import RecipeError, SparseConfig, SparsityConfig, SparsityError, sparsify, summarize
from hf_sparse.hf.peft import merged_update
from tests.helpers.training import Rows, arguments, bert

TARGETS = ["query", "dense"]
LAYER = "bert.encoder.layer.1.output.dense"
ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "lora with bias": peft.LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
    "loha": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same sparse model, packed and dense."""
    folder = tmp_path_factory.mktemp("adapters")
    model = sparsify(bert(), SparsityConfig(sparsity=0.9))
    model.save_pretrained(folder / "packed")
    model.save_pretrained(folder / "dense", format="dense")
    return folder / "packed", folder / "dense"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def adapted(model: Any, config: Any) -> Any:
    """Give the model an adapter that changes it: with random values instead of those that do nothing."""
    wrapped = peft.get_peft_model(model, copy.deepcopy(config))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, 1.0 if "ia3" in name else 0.0, 0.1)
    return wrapped.eval()


def targets(model: Any) -> dict[str, torch.Tensor]:
    names = {weight.name for weight in summarize(model).weights}
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if name in names}


# -- training --------------------------------------------------------------------------------------------------------


def test_lora_trains_on_a_sparse_base_and_merges_into_a_sparse_model(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base = load(folders[0])
    before = targets(base)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS"))
    assert summarize(wrapped).sparsity == summarize(load(folders[0])).sparsity
    Trainer(wrapped, arguments(tmp_path, max_steps=10, learning_rate=0.01), train_dataset=Rows()).train()
    merged: Any = wrapped.merge_and_unload()
    for name, weight in targets(merged).items():
        assert torch.all(weight[before[name] == 0] == 0), name
        trained = any(target in name for target in TARGETS)
        assert torch.equal(weight, before[name]) != trained, name
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert again.state_dict().keys() == merged.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in merged.state_dict().items())
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert size < (folders[1] / "model.safetensors").stat().st_size
    # And it is a sparse model like any other: its zeros stay in full fine-tuning too.
    Trainer(again.requires_grad_(), arguments(tmp_path, max_steps=2), train_dataset=Rows()).train()
    assert summarize(again).nonzeros == summarize(merged).nonzeros


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weight_is_that_of_peft_with_the_zeros_kept(name: str, safe: bool, folders: tuple[Path, Path]) -> None:
    zeros = {key: weight == 0 for key, weight in targets(load(folders[0])).items()}
    dense = adapted(load(folders[1]), ADAPTERS[name]).merge_and_unload(safe_merge=safe).state_dict()
    merged = adapted(load(folders[0]), ADAPTERS[name]).merge_and_unload(safe_merge=safe)
    assert type(merged.get_submodule(LAYER)) is torch.nn.Linear
    for key, weight in merged.state_dict().items():
        expected = dense[key].masked_fill(zeros[key], 0) if key in zeros else dense[key]
        assert torch.equal(weight, expected), key


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "loha"])
def test_merging_and_unmerging_comes_back_to_the_sparse_model(name: str, folders: tuple[Path, Path]) -> None:
    before = targets(load(folders[0]))
    wrapped = adapted(load(folders[0]), ADAPTERS[name])
    ids = Rows(4).ids
    expected = wrapped(input_ids=ids).logits
    for _ in range(2):
        wrapped.merge_adapter()
        assert summarize(wrapped).nonzeros <= sum(int((weight != 0).sum()) for weight in before.values())
        wrapped.unmerge_adapter()
        with pytest.raises(SparsityError, match="no adapters are merged into sparse weights"):
            merged_update(wrapped)
    torch.testing.assert_close(wrapped(input_ids=ids).logits, expected)
    for key, weight in targets(wrapped.unload()).items():
        assert torch.equal(weight == 0, before[key] == 0), key
        torch.testing.assert_close(weight, before[key])


def test_weight_that_becomes_zero_by_chance_is_not_lost(folders: tuple[Path, Path]) -> None:
    wrapped = adapted(load(folders[0]), ADAPTERS["lora"])
    layer = wrapped.base_model.model.get_submodule(LAYER)
    row, column = (layer.weight != 0).nonzero()[0].tolist()
    layer.lora_A["default"].weight.data.zero_()[0, column] = 1.0
    layer.lora_B["default"].weight.data.zero_()[row, 0] = -layer.weight[row, column].item() / layer.scaling["default"]
    value = layer.weight[row, column].item()
    wrapped.merge_adapter()
    assert layer.weight[row, column] == 0
    wrapped.unmerge_adapter()
    assert layer.weight[row, column] == value


def test_two_adapters_merge_one_after_the_other(folders: tuple[Path, Path]) -> None:
    def two(folder: Path) -> Any:
        wrapped = adapted(load(folder), ADAPTERS["lora"])
        wrapped.add_adapter("second", ADAPTERS["lora"])
        for name, parameter in wrapped.named_parameters():
            if "second" in name:
                torch.nn.init.constant_(parameter, 0.01)
        wrapped.base_model.set_adapter(["default", "second"])
        return wrapped.merge_and_unload()

    zeros = {key: weight == 0 for key, weight in targets(load(folders[0])).items()}
    dense = two(folders[1]).state_dict()
    for key, weight in targets(two(folders[0])).items():
        assert torch.equal(weight, dense[key].masked_fill(zeros[key], 0)), key


def test_adapter_that_changes_the_base_before_it_trains_keeps_the_zeros(folders: tuple[Path, Path]) -> None:
    base = load(folders[0])
    before = targets(base)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    merged = peft.get_peft_model(base, config).merge_and_unload()
    for key, weight in targets(merged).items():
        assert torch.all(weight[before[key] == 0] == 0), key
        torch.testing.assert_close(weight, before[key])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_merge_themselves(how: str, folders: tuple[Path, Path]) -> None:
    wrapped = adapted(load(folders[0]), ADAPTERS["lora"])
    if how == "deepcopy":
        twin = copy.deepcopy(wrapped)
    else:
        file = io.BytesIO()
        torch.save(wrapped, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    before = targets(load(folders[0]))
    merged = twin.merge_and_unload()
    assert all(torch.all(weight[before[key] == 0] == 0) for key, weight in targets(merged).items())
    assert torch.equal(wrapped.base_model.model.get_submodule(LAYER).weight, before[f"{LAYER}.weight"])
    assert merged_update(merged).norm > 0.0
    with pytest.raises(SparsityError, match="no adapters are merged"):
        merged_update(wrapped)


# -- what it cost ----------------------------------------------------------------------------------------------------


def test_lost_update_is_logged_and_reported(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    wrapped = adapted(load(folders[0]), ADAPTERS["lora"])
    before = targets(load(folders[0]))
    deltas = {
        f"{name}.weight": module.get_delta_weight("default")
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight") and f"{name}.weight" in before
    }
    norm = sum(float(delta.double().square().sum()) for delta in deltas.values()) ** 0.5
    lost = sum(float(delta[before[key] == 0].double().square().sum()) for key, delta in deltas.items()) ** 0.5
    update = merged_update(wrapped.merge_and_unload())
    assert len(update.layers) == len(deltas) == 8
    assert update.norm == pytest.approx(norm, rel=1e-4)
    assert update.lost == pytest.approx(lost, rel=1e-4)
    assert 0.9 < update.lost_fraction < 1.0  # nine tenths of the entries, so about 95 % of the norm
    assert f"{update.lost_fraction:.1%} of the update fell on zeros and is lost" in caplog.text
    assert caplog.text.count("merged adapters") == 1


def test_there_is_no_update_to_report_before_adapters_are_merged(folders: tuple[Path, Path]) -> None:
    # An adapter that was not trained adds nothing, and is merged all the same.
    wrapped = peft.get_peft_model(load(folders[0]), copy.deepcopy(ADAPTERS["lora"]))
    for model in (wrapped, torch.nn.Sequential()):
        with pytest.raises(SparsityError, match=r"Call merge_and_unload\(\) or merge_adapter\(\) first"):
            merged_update(model)
    update = merged_update(wrapped.merge_and_unload())
    assert (update.norm, update.lost, update.lost_fraction, len(update.layers)) == (0.0, 0.0, 0.0, 8)


def test_merging_into_a_quantized_model_warns(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    config = SparseConfig(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    adapted(load(folders[0], quantization_config=config), ADAPTERS["lora"]).merge_and_unload()
    assert "bitsandbytes has quantized fills its zeros" in caplog.text


def test_pruning_a_model_that_is_wrapped_in_adapters_is_an_error(folders: tuple[Path, Path]) -> None:
    wrapped = adapted(load(folders[0]), ADAPTERS["lora"])
    with pytest.raises(RecipeError, match=r"query' is wrapped in adapters.*merge_and_unload"):
        sparsify(wrapped, SparsityConfig(sparsity=0.95))
    assert summarize(sparsify(wrapped.merge_and_unload(), SparsityConfig(sparsity=0.95))).sparsity > 0.949


def test_saving_a_model_that_is_wrapped_in_adapters_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    wrapped = adapted(load(folders[0]), ADAPTERS["lora"])
    with pytest.raises(RecipeError, match="wrapped in adapters"):
        wrapped.base_model.model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())
    wrapped.unload().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


# -- models that are not ours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dequantized", [False, True])
def test_models_that_keep_no_zeros_are_left_to_peft(dequantized: bool, folders: tuple[Path, Path]) -> None:
    model = load(folders[0]).dequantize(torch.float32) if dequantized else load(folders[1])
    wrapped = adapted(model, ADAPTERS["lora"])
    for module in wrapped.modules():
        assert not {"merge", "unmerge", "merge_and_unload", "merge_adapter"} & vars(module).keys()
    merged = wrapped.merge_and_unload()
    assert torch.count_nonzero(merged.get_submodule(LAYER).weight) > 0.99 * 32 * 64


@pytest.mark.parametrize("options", [{}, {"format": "dense"}])
def test_adapter_that_transformers_put_on_is_saved(
    options: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers refuses PEFT {peft.__version__}: it needs {MIN_PEFT_VERSION}")
    adapted(load(folders[0]), ADAPTERS["lora"]).save_pretrained(tmp_path / "first")
    model = load(folders[0])
    model.load_adapter(str(tmp_path / "first"))
    model.save_pretrained(tmp_path / "second", **options)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", ["load_adapter", "from_pretrained", "PeftModel"])
def test_adapter_loads_onto_a_packed_base(how: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    wrapped = adapted(load(folders[0]), ADAPTERS["lora"])
    wrapped.save_pretrained(tmp_path)
    if how == "from_pretrained":
        model = load(tmp_path)
    elif how == "load_adapter":
        model = load(folders[0])
        model.load_adapter(str(tmp_path))
    else:
        model = peft.PeftModel.from_pretrained(load(folders[0]), str(tmp_path))
    ids = Rows(4).ids
    assert torch.equal(model.eval()(input_ids=ids).logits, wrapped(input_ids=ids).logits)
