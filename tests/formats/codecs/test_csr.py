"""CSR: rows, columns and index types by hand."""

import dataclasses

import pytest
import torch

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.codecs import decode, pack
from hf_sparse.formats.codecs.base import Source
from hf_sparse.formats.codecs.csr import CSR, index_type

WEIGHT = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])


def test_csr_stores_columns_and_counts():
    _, parts = pack(Source(WEIGHT), CSR())
    assert parts[""].tolist() == [1.0, 2.0, 3.0]
    assert parts["_columns"].tolist() == [1, 2, 0]
    assert parts["_counts"].tolist() == [2, 0, 1]
    assert parts["_columns"].dtype == torch.uint8


def test_csr_takes_all_dimensions_but_the_first_as_columns():
    _, parts = pack(Source(WEIGHT.view(3, 1, 3)), CSR())
    assert parts["_columns"].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, "U8"), (255, "U8"), (256, "U16"), (65535, "U16"), (65536, "U32"), (2**32, "U64")]
)
def test_csr_takes_the_narrowest_index_that_holds_the_number_of_columns(columns, expected):
    assert index_type(columns) == expected


@pytest.mark.parametrize("columns", [255, 256, 65536])
def test_csr_round_trips_a_full_row(columns):
    tensor = torch.zeros(3, columns, dtype=torch.float16)
    tensor[1] = 1.0
    entry, parts = pack(Source(tensor), CSR())
    assert torch.equal(decode(entry, parts), tensor)


@pytest.mark.parametrize(
    ("suffix", "hurt", "complaint"),
    [
        ("_columns", [1, 3, 0], "not among the 3"),
        ("_columns", [2, 1, 0], "ascending order"),
        ("_columns", [1, 1, 0], "ascending order"),
        ("_counts", [2, 1, 1], "do not add up to 3"),
        ("_counts", [0, 0, 3], "ascending order"),
        ("_counts", [255, 2, 2], "do not add up to 3"),
    ],
)
def test_csr_refuses_rows_that_contradict_themselves(suffix, hurt, complaint):
    entry, parts = pack(Source(WEIGHT), CSR())
    parts[suffix] = torch.tensor(hurt, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=complaint):
        decode(entry, parts)


def test_csr_refuses_counts_whose_sum_wraps_around():
    # 2**32 columns need 64-bit indices: counts of 2**63 twice would add up to 0.
    entry, parts = pack(Source(WEIGHT), CSR())
    entry = dataclasses.replace(entry, shape=(3, 2**32), nonzeros=3)
    wide = {suffix: part.to(torch.uint64) if suffix else part for suffix, part in parts.items()}
    wide["_counts"] = torch.tensor([2**63, 2**63, 3], dtype=torch.uint64)
    with pytest.raises(CheckpointError, match="more than 1024 times"):
        decode(entry, wide)
    with pytest.raises(CheckpointError, match="do not add up to 3"):
        CSR().decode(entry, wide)
