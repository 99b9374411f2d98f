"""What every registered family promises; and a family from one file, with numbers by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import compact, to_runtime
from hf_sparse.kernels import LibraryStatus
from hf_sparse.modeling.architectures import FAMILIES, Family, known_sub_blocks
from hf_sparse.modeling.architectures.filters import filters_in
from tests.helpers import convolutional, decoders, structures, tiny_encoder
from tests.helpers.architecture_contract import blocks_of, check_family, check_filters, load_example
from tests.helpers.contributing import example as read_example

VISION = ("vit", "deit")
NAMES = (*structures.FAMILIES, *decoders.FAMILIES, *VISION)
CONVOLUTIONAL = tuple(name for name in convolutional.FAMILIES if name not in VISION)
SLOW = ("mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma", "gemma2", "mixtral", "qwen3-moe", "deit")
"""Each has a family that is tested with another of its models."""
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))


def family_of(model: Any) -> Family:
    """Return the family that describes a model."""
    (found,) = [family for family in FAMILIES.values() if blocks_of(family, model) or filters_in(model, family.filters)]
    return found


def outputs(name: str) -> Any:
    """Return a function that gives the logits for 18 tokens, without and with padding, or for images."""
    if name in VISION:
        return convolutional.outputs
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, structures.VOCABULARY, (2, 18), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    if name in decoders.FAMILIES:
        mask = mask.flip(1)  # padded on the left
    decoder = {"decoder_input_ids": ids[:, :7]} if "t5" in name else {}

    def run(model: Any) -> Tensor:
        given = [{"input_ids": ids, **decoder}, {"input_ids": ids, "attention_mask": mask, **decoder}]
        return torch.cat([model(**each).logits for each in given])

    return run


def build(name: str) -> Any:
    if name in convolutional.FAMILIES:
        return convolutional.build(name)
    return decoders.build(name) if name in decoders.FAMILIES else structures.build(name)


@pytest.mark.parametrize("name", EACH)
def test_family_keeps_its_promises(name: str) -> None:
    check_family(family_of(build(name)), lambda: build(name), outputs(name))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_filters_of_a_family_leave_with_all_that_belongs_to_them(name: str) -> None:
    check_filters(family_of(build(name)), lambda: build(name), convolutional.outputs)


def test_every_registered_family_is_tested() -> None:
    tested = {family_of(build(name)).name for name in (*NAMES, *CONVOLUTIONAL)}
    assert tested == set(FAMILIES)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the worked example from a file somewhere else, and forget it afterwards."""
    FAMILIES.pop("TinyEncoder", None)  # registered already where the example itself runs this contract
    known, part = dict(FAMILIES), read_example("An architecture")
    monkeypatch.setitem(sys.modules, part.module, None)
    yield load_example(part.source, part.module, tmp_path, sys.modules)
    FAMILIES.clear()
    FAMILIES.update(known)


def test_example_tiny_family_of_one_file_keeps_the_promises(example: Any) -> None:
    assert example.TINY.name in FAMILIES
    check_family(example.TINY, tiny_encoder.build, tiny_encoder.outputs)


def test_family_of_one_file_by_hand(example: Any) -> None:
    model = tiny_encoder.build()
    attention, feed_forward = (block for block in known_sub_blocks(model) if block.name.startswith("layers.0."))
    assert (attention.name, attention.groups, attention.size) == ("layers.0.0", 4, 4)
    assert (feed_forward.name, feed_forward.groups, feed_forward.size) == ("layers.0.1", 12, 1)
    with torch.no_grad():  # of the second head, features 4 to 7, nothing comes out; nor of neuron 3
        attention.output.weight[:, 4:8] = 0.0
        for layer in attention.inputs.values():
            layer.weight[4:8] = 0.0
            layer.bias[4:8] = 0.0
        feed_forward.output.weight[:, 3] = 0.0
    edits = compact(model)
    assert {name: tuple(cut.kept) for _, name, cut in edits} == {
        "layers.0.0": (0, 2, 3),
        "layers.0.1": (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11),
    }
    assert tuple(model.layers[0][0].core.query.weight.shape) == (12, 16)
    assert tuple(model.layers[0][0].end.dense.weight.shape) == (16, 12)
    assert tuple(model.layers[0][1].up.weight.shape) == (11, 16)
    assert model.layers[0][0].core.heads == 3


def test_class_that_is_derived_from_a_known_one_is_not_fused(example: Any) -> None:
    model = tiny_encoder.build()
    derived = type("TinyFeedForward", (type(model.layers[0][1]),), {"__module__": "somewhere.else"})
    model.layers[0][1].__class__ = derived
    with torch.no_grad():
        for block in known_sub_blocks(model):
            for layer in (*block.inputs.values(), block.output):
                layer.weight[:, ::2] = 0.0
    report = to_runtime(model, "cpu")
    kernels = {layer.name: layer.kernel for layer in report.layers}
    assert kernels["layers.0.1.up"] == "sparse_linear"
    assert kernels["layers.1.1.up"] == "sparse_ffn"
