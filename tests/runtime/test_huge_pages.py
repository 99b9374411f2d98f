"""Packed weights lie side by side, in memory for which huge pages were asked."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import sys
import weakref
from pathlib import Path

import pytest
import torch

from hf_sparse import to_runtime
from hf_sparse.runtime import huge_pages
from hf_sparse.runtime.huge_pages import ALIGNMENT, BLOCK, HugePages
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import NATIVE
from tests.helpers.runtime_models import answers, sparse_decoder

linux = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages"
)


def flags_at(address: int) -> list[str]:
    """Return what the kernel notes of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("not mapped")


@linux
def test_copies_are_equal_aligned_and_side_by_side() -> None:
    memory = HugePages()
    given = [torch.randn(3, 5), torch.arange(7, dtype=torch.int32), torch.zeros(0, 4), torch.randn(9).bfloat16()]
    found = memory.take([given[0].T, *given[1:]])
    for one, other in zip(found, [given[0].T, *given[1:]], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert found[0].is_contiguous()
    places = [each.data_ptr() for each in found if each.numel()]
    assert [place - places[0] for place in places] == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert found[2] is given[2]


@linux
def test_a_tensor_larger_than_a_block_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "BLOCK", 4096)
    memory = HugePages()
    small, large, last = (memory.take([torch.full((size,), 1.0)])[0] for size in (8, 5000, 8))
    assert small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()
    assert all(bool((each == 1).all()) for each in (small, large, last))


@linux
def test_a_block_goes_with_its_last_tensor() -> None:
    memory = HugePages()
    tensor = memory.take([torch.ones(4)])[0]
    place, block = tensor.data_ptr(), weakref.ref(memory.block)
    del memory
    gc.collect()
    assert block() is not None
    assert tensor.tolist() == [1.0] * 4
    del tensor
    gc.collect()
    assert block() is None
    with pytest.raises(AssertionError, match="not mapped"):
        flags_at(place)


def test_each_tensor_is_saved_alone() -> None:
    given = torch.ones(4), torch.arange(3)
    found = HugePages().take(given)
    kept = io.BytesIO()
    torch.save(found, kept)
    assert kept.tell() < 4000
    kept.seek(0)
    for one, other in zip(torch.load(kept, weights_only=True), given, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(copy.deepcopy(found), given, strict=True))


@linux
def test_without_room_or_huge_pages_tensors_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(4)
    monkeypatch.setattr(huge_pages, "BLOCK", 1 << 62)
    assert HugePages().take([tensor])[0] is tensor
    monkeypatch.undo()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert HugePages().take([tensor])[0] is tensor


@linux
def test_huge_pages_are_asked_for() -> None:
    tensor = HugePages().take([torch.ones(BLOCK // 8)])[0]
    assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    assert "hg" not in flags_at(torch.ones(4).data_ptr())


@linux
@pytest.mark.skipif(NATIVE is None, reason="needs the C++ kernels")
@pytest.mark.parametrize("backend", ["bitmask", "cpu"])
def test_packed_weights_of_a_model_lie_there(backend: str) -> None:
    model = sparse_decoder("llama")
    ids = {"input_ids": torch.randint(3, 30, (1, 4))}
    expected = answers(model, ids)
    to_runtime(model, backend)
    torch.testing.assert_close(answers(model, ids), expected, atol=1e-5, rtol=1e-5)
    operands = [part for each in model.modules() if isinstance(each, PackedLinear) for part in each.packed.operands]
    places = [part.data_ptr() for part in operands if part.numel()]
    assert max(places) - min(places) < BLOCK, "in one block"
    assert "hg" in flags_at(operands[0].data_ptr())
