from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from hf_sparse.errors import BackendError
from hf_sparse.kernels import PackedWeight, pack, unpack


def sparse(out: int, width: int, zeros: float) -> torch.Tensor:
    return torch.randn(out, width) * (torch.rand(out, width) >= zeros)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (16, 128), (33, 129), (50, 300), (0, 4), (4, 0)])
@pytest.mark.parametrize("zeros", [0.0, 0.9, 1.0])
def test_unpack_gives_back_every_bit(rows, shape, zeros):
    weight = sparse(shape[0], shape[1], zeros)
    packed = pack(weight, rows)
    assert torch.equal(unpack(packed), weight)  # equal floats have equal bits, but for the sign of zero
    assert packed.values.shape[1] == rows


def test_block_columns_of_zeros_are_dropped():
    weight = torch.zeros(8, 400)
    weight[5, 250] = 2
    packed = pack(weight, 4)
    assert packed.chunk == 208  # two of equal width, in steps of 16
    assert packed.values.tolist() == [[0, 2, 0, 0]]
    assert packed.columns.tolist() == [42]
    assert packed.pointers.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("rows", "zeros", "chunk"),
    [(1, 0.2, 128), (1, 0.9, 192), (2, 0.9, 192), (4, 0.2, 256), (4, 0.9, 256), (16, 0.9, 256)],
)
def test_chunks_are_as_wide_as_the_blocks_can_do_with(rows, zeros, chunk):
    packed = pack(sparse(32, 768, zeros), rows)
    assert packed.chunk == chunk
    assert packed.pointers.shape == (768 // chunk, 32 // rows + 1)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 127, 129, 255, 256, 257, 300, 769, 3000])
@pytest.mark.parametrize("rows", [1, 4])
def test_every_width_has_chunks_that_its_pointers_tell(rows, width):
    packed = pack(torch.ones(5, width), rows)
    assert packed.pointers.shape[0] == -(-width // packed.chunk)
    assert torch.equal(unpack(packed), torch.ones(5, width))


def test_a_ninety_percent_weight_takes_a_seventh():
    assert pack(sparse(768, 3072, 0.9)).nbytes < 0.15 * 768 * 3072 * 4


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])  # noqa: S301
def test_copies_are_whole(clone):
    weight = sparse(9, 20, 0.5)
    assert torch.equal(unpack(clone(pack(weight, 2))), weight)


@pytest.mark.parametrize(
    "spoil",
    [
        {"columns": torch.tensor([0, 99, 1], dtype=torch.uint8)},
        {"columns": torch.tensor([0, 255, 1], dtype=torch.uint8)},
        {"pointers": torch.tensor([[0, 2, 999]], dtype=torch.int32)},
        {"pointers": torch.tensor([[-5, 2, 3]], dtype=torch.int32)},
        {"pointers": torch.tensor([[0, 3, 2]], dtype=torch.int32)},
        {"pointers": torch.tensor([[0, 3]], dtype=torch.int32)},
        {"values": torch.zeros(3, 2)},
        {"values": torch.zeros(2, 1)},
        {"columns": torch.tensor([0, 1, 1])},
        {"out_features": 90},
        {"in_features": 1000},
        {"rows": 3},
    ],
)
def test_spoilt_parts_are_refused(spoil):
    good = pack(torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]]))
    parts = {name: getattr(good, name) for name in [field.name for field in dataclasses.fields(PackedWeight)]}
    assert PackedWeight(**parts).nbytes == good.nbytes
    with pytest.raises(BackendError):
        PackedWeight(**{**parts, **spoil})


@pytest.mark.parametrize(
    ("weight", "rows"), [(torch.zeros(3), 1), (torch.zeros(3, 3).half(), 1), (torch.zeros(3, 3), 3)]
)
def test_pack_refuses_what_it_cannot_hold(weight, rows):
    with pytest.raises(BackendError, match="pack"):
        pack(weight, rows)
