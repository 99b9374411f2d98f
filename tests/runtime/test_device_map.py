"""`to_runtime` of a model that a device_map has spread: what is in memory is packed, the rest stays, hooks are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForSequenceClassification

from hf_sparse import (
    BackendError,
    RecipeError,
    SparseConfig,
    SparsityConfig,
    sparsify,
    summarize,
    to_dense_runtime,
    to_runtime,
)
from hf_sparse.runtime.convert import is_runtime
from tests.helpers.training import Rows, bert

SPREAD: dict[str, Any] = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "cpu",
    "bert.encoder.layer.1": "disk",
    "bert.pooler": "cpu",
    "classifier": "cpu",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    sparsify(bert(), SparsityConfig(sparsity=0.9)).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=Rows(4).ids).logits
        return found


def hooks(model: Any) -> dict[str, Any]:
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


def test_layers_on_disk_stay_and_the_others_are_packed(packed: Path, tmp_path: Path) -> None:
    whole = load(packed)
    expected = logits(whole)
    model = load(packed, device_map=SPREAD, offload_folder=str(tmp_path))
    before = hooks(model)
    assert before["bert.encoder.layer.0"].offload is False
    report = to_runtime(model, "cpu")
    assert {layer.name[:20] for layer in report.sparse} == {"bert.encoder.layer.0"}
    away = [layer for layer in report.layers if layer.name.startswith("bert.encoder.layer.1.")]
    assert len(away) == 6
    assert all("offloaded" in (layer.reason or "") for layer in away)
    assert all(layer.sparsity == pytest.approx(0.9, abs=0.01) for layer in away)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert all(hooks(model)[name] is hook for name, hook in before.items())
    to_dense_runtime(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert hooks(model) == before


def test_each_device_of_a_pipeline_is_packed_and_moves_its_inputs(packed: Path) -> None:
    model = load(packed)
    expected = logits(model)
    places = {name: "cpu" if place == "disk" else place for name, place in SPREAD.items()}
    dispatch_model(model, places, main_device="cpu", force_hooks=True)
    for hook in hooks(model).values():
        assert isinstance(hook, AlignDevicesHook)
    calls: list[str] = []
    for name, hook in hooks(model).items():
        original = hook.pre_forward

        def pre_forward(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        hook.pre_forward = pre_forward
    assert len(to_runtime(model, "cpu").sparse) == 12
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= set(calls)


def test_layers_on_a_device_without_memory_stay(packed: Path) -> None:
    model = load(packed)
    model.bert.encoder.layer[1].to("meta")
    report = to_runtime(model, "cpu")
    assert {layer.name[:20] for layer in report.sparse} == {"bert.encoder.layer.0"}
    assert is_runtime(model)


def test_model_of_which_nothing_is_in_memory_is_refused(packed: Path, tmp_path: Path) -> None:
    model = load(packed, device_map={"": "disk"}, offload_folder=str(tmp_path))
    with pytest.raises(BackendError, match=r"nothing can be packed.*offloaded.*Load the whole model onto the CPU"):
        to_runtime(model, "cpu")
    assert not is_runtime(model)


def test_2_4_is_made_on_each_device_and_not_on_disk(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "dense")
    config = SparseConfig(pattern="2:4", scorer="magnitude")
    expected = load(tmp_path / "dense", quantization_config=config)
    places = dict.fromkeys(SPREAD, "cpu")
    found = load(tmp_path / "dense", quantization_config=config, device_map=places)
    assert torch.equal(logits(found), logits(expected))
    assert summarize(expected).sparsity == 0.5
    with pytest.raises(
        RecipeError, match=r"offloaded by a device_map.*block by block, by hf_sparse.sparsify_checkpoint"
    ):
        load(tmp_path / "dense", quantization_config=config, device_map=SPREAD, offload_folder=str(tmp_path / "parts"))
