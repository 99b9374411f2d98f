"""Every family of transformers that saves and loads dense does so packed, to the same bits and with the same marks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.modeling.integration import integration_of
from hf_sparse.modeling.model_state import mark_sparse_weights, sparse_weights
from tests.helpers.tiny_families import tiny_model

LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)

REPRESENTATIVE = (
    "audio-spectrogram-transformer", "beit", "bert", "clip", "deit", "detr", "dinov2", "gpt2", "llava", "mixtral",
    "qwen2_vl", "segformer", "swin", "t5", "vision-encoder-decoder", "vit", "vit_mae",
)  # fmt: skip


def make_sparse(model: PreTrainedModel) -> list[str]:
    """Set every second entry of the weights of all layers to 0, mark them, and return their names."""
    names = []
    owners = Counter(id(weight) for layer in model.modules() for weight in layer._parameters.values())
    for path, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, LAYERS) and weight is not None and weight.numel() > 1 and owners[id(weight)] == 1:
            with torch.no_grad():
                weight.view(-1)[::2] = 0
            names.append(f"{path}.weight")
    mark_sparse_weights(model, names)
    integration_of(model).after_keep_zeros(model)  # nothing was requested
    return names


def round_trip(kind: str, folder: Path) -> str | None:
    """Save a tiny model dense and packed, load both and compare; return why the family cannot be judged, or None.

    Raises:
        AssertionError: if it loads otherwise from the packed file.
        Exception: whatever saving or loading it packed raises.
    """
    try:
        model = tiny_model(kind)
    except Exception as error:  # noqa: BLE001  whatever a family does not like
        return f"cannot be built: {type(error).__name__}: {error}"
    names = make_sparse(model)
    try:
        model.save_pretrained(folder / "dense", format="dense")
        dense, lacking = _load(type(model), folder / "dense")
    except Exception as error:  # noqa: BLE001
        return f"dense: {type(error).__name__}: {error}"
    model.save_pretrained(folder / "packed")
    packed, missing = _load(type(model), folder / "packed")
    assert missing == lacking
    expected, state, original = dense.state_dict(), packed.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    different = [key for key in expected if not _equal(state[key], expected[key])]
    if different:  # what no file holds may be memory that nobody initializes: it differs between dense loads too
        again = _load(type(model), folder / "dense")[0].state_dict()
        different = [key for key in different if _equal(again[key], expected[key])]
    assert not different, f"other values: {different[:3]}"
    read = [name for name in names if name in expected and _equal(expected[name], original[name])]
    lost = set(read) - set(sparse_weights(packed))
    assert not lost, f"not marked any more: {sorted(lost)[:3]}"
    if names and not read:
        return "dense: loads none of the layers that were saved"
    return None


def _load(cls: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Load from a fixed random state; return the model and the keys that are missing, unexpected or of another size."""
    torch.manual_seed(0)
    loads: Any = cls.from_pretrained
    if loads.__func__ is not PreTrainedModel.__dict__["from_pretrained"].__func__:  # its own, which returns no keys
        return loads(folder), {}
    model, keys = loads(folder, output_loading_info=True)
    return model, {what: sorted(map(str, found)) for what, found in keys.items()}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_a_representative_family_loads_packed_as_dense(kind: str, tmp_path: Path) -> None:
    assert round_trip(kind, tmp_path) is None
