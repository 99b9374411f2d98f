"""What every origin of checkpoints promises; a new one is picked up by itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse.hf.conversion.sources as every_source
from hf_sparse import CheckpointError
from hf_sparse.formats.safetensors_io import Stored
from hf_sparse.hf.conversion.checkpoint import Checkpoint, open_checkpoint
from hf_sparse.hf.conversion.source import SOURCES, Source, source_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = [path.parent for path in sorted(FIXTURES.rglob("config.json"))]


class Tensors:
    """A store of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.headers = {key: Stored("F32", tuple(t.shape), t.nbytes) for key, t in tensors.items()}

    def get(self, key: str) -> Tensor:
        return self._tensors[key]


def odd_checkpoints() -> Iterator[Checkpoint]:
    """Yield checkpoints of no origin, of which none may surprise a source."""
    one = {"a.weight": torch.ones(2, 2)}
    configs: tuple[dict[str, Any], ...] = (
        {},
        {"model_type": "bert"},
        {"model_type": "no_such_model"},
        {"model_type": 3, "architectures": "BertModel"},
        {"pruned_heads": {}, "quantization_config": {}},
    )
    for config in configs:
        for tensors in ({}, one):
            yield Checkpoint(Path("nowhere"), config, (), Tensors(tensors))


def recognized(source: type[Source], checkpoint: Checkpoint) -> bool:
    try:
        found = source.recognizes(checkpoint)
    except CheckpointError:
        return False
    assert isinstance(found, bool)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_describes_itself(source: type[Source]) -> None:
    assert source.name
    assert source.__doc__ not in (None, Source.__doc__)
    assert [other for other in SOURCES if other.name == source.name] == [source]
    if source.__module__.startswith("hf_sparse.") and hasattr(every_source, source.__name__):
        assert inspect.getsourcefile(source) not in {inspect.getsourcefile(o) for o in SOURCES if o is not source}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_decides_about_any_checkpoint(source: type[Source]) -> None:
    for checkpoint in odd_checkpoints():
        recognized(source, checkpoint)
    for folder in FOLDERS:
        with open_checkpoint(folder) as checkpoint:
            recognized(source, checkpoint)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_chosen_source_gives_each_tensor_once_and_the_same_at_each_read(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        source = source_of(checkpoint)
        tensors = list(source.tensors())
        assert len({tensor.key for tensor in tensors}) == len(tensors) > 0
        for tensor in tensors:
            first = tensor.read()
            assert torch.equal(first, tensor.read())
            assert tensor.packed is not None or not tensor.target
        assert not {"quantization_config", "compression_config", "pruned_heads"} & set(source.config())


def test_last_source_takes_every_checkpoint() -> None:
    assert all(SOURCES[-1].recognizes(checkpoint) for checkpoint in odd_checkpoints())
    assert [source.rank for source in SOURCES] == sorted(source.rank for source in SOURCES)
