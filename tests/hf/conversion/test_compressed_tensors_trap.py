"""A trap: compressed-tensors from 0.15 on loads the sparse checkpoints of its own past as random weights.

It lost the sparse formats, and finds nothing to do for a `quantization_config` without `config_groups`: transformers
reports the weights as missing, makes them up, and goes on. Seen with compressed-tensors 0.15.0 and 0.20.1
(`pip install "compressed-tensors>=0.15"` in an environment of its own); the first test runs where it is installed.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_plain
from transformers import AutoModel

from hf_sparse import import_checkpoint

LEGACY = Path(__file__).parents[2] / "fixtures" / "compressed-tensors-0.14"
PAIRS = {"sparse-bitmask": "dense-bitmask", "sparse-24-bitmask": "dense-24"}
WEIGHT = "encoder.layer.0.attention.self.query.weight"


def installed() -> tuple[int, ...]:
    if importlib.util.find_spec("compressed_tensors") is None:
        return (0,)
    return tuple(int(part) for part in metadata.version("compressed-tensors").split(".")[:2])


def right(name: str) -> torch.Tensor:
    return load_plain(LEGACY / PAIRS[name] / "model.safetensors")[WEIGHT]


@pytest.mark.skipif(installed() < (0, 15), reason="needs compressed-tensors 0.15 or later")
@pytest.mark.parametrize("name", PAIRS)
def test_the_library_itself_gives_random_weights_and_no_error(name: str) -> None:
    loaded = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model: Any = AutoModel.from_pretrained(LEGACY / name)
        loaded.append(model.get_parameter(WEIGHT).detach())
    assert not torch.equal(loaded[0], loaded[1])
    assert all(int((weight == 0).sum()) == 0 for weight in loaded)
    assert int((right(name) == 0).sum()) > 0.4 * right(name).numel()


@pytest.mark.parametrize("name", PAIRS)
def test_the_converter_gives_the_right_weights(name: str, tmp_path: Path) -> None:
    import_checkpoint(LEGACY / name, tmp_path / "out")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model: Any = AutoModel.from_pretrained(tmp_path / "out")
        assert torch.equal(model.get_parameter(WEIGHT).detach(), right(name))
