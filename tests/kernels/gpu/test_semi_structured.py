"""2:4 on paper: what is refused and why, layouts that torch's own helpers read, and padding around a product of a fake.

The products need a GPU: tests/gpu.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hf_sparse import BackendError, CheckpointError
from hf_sparse.formats.codecs import encode
from hf_sparse.kernels.gpu import semi_structured, semi_structured_layout
from hf_sparse.kernels.gpu.semi_structured import (
    Packed,
    SemiStructuredLinear,
    default_backend,
    from_codec,
    pack_semi_structured,
    refusal,
    unpack_semi_structured,
)

TYPES = [torch.float16, torch.bfloat16, torch.int8]
AMPERE, HOPPER = (8, 0), (9, 0)


def two_of_four(rows: int, cols: int, dtype: torch.dtype = torch.float16, kept: int = 2) -> Tensor:
    """Return random numbers, none of them zero where they are kept."""
    weight = torch.randint(1, 100, (rows, cols)) * (2 * torch.randint(0, 2, (rows, cols)) - 1)
    order = torch.rand(rows * cols // 4, 4).argsort(dim=1)
    return torch.where((order < kept).view(rows, cols), weight, 0).to(dtype)


@pytest.fixture
def cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that torch has cuSPARSELt."""
    monkeypatch.setattr(semi_structured, "cusparselt_version", lambda: 702)


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 128), (96, 384), (64, 1152)])
def test_full_groups_pack_as_torch_packs_them(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = two_of_four(*shape, dtype)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack_semi_structured(weight)
    assert torch.equal(packed.values, values)
    assert torch.equal(packed.meta, meta)
    assert packed.meta.dtype == meta.dtype


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_is_packed_comes_back_by_torch_and_by_us(dtype: torch.dtype, kept: int) -> None:
    weight = two_of_four(64, 256, dtype, kept)
    weight[3:9] = 0
    packed = pack_semi_structured(weight)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)
    assert torch.equal(unpack_semi_structured(packed), weight)
    # And ours reads what torch has written.
    assert torch.equal(unpack_semi_structured(Packed(*sparse_semi_structured_from_dense_cutlass(weight))), weight)


def test_places_in_a_group_are_two_different_ones_that_ascend() -> None:
    weight = two_of_four(32, 64, kept=1)
    words = semi_structured_layout._order(32, pack_semi_structured(weight).meta).long() & 0xFFFF
    groups = torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)])
    assert bool(((groups & 3) < (groups >> 2)).all())


def test_negative_zero_is_kept_where_there_is_room() -> None:
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[0, :4] = torch.tensor([-0.0, 5.0, 0.0, 0.0])
    weight[0, 4:8] = torch.tensor([-0.0, 5.0, 6.0, 0.0])
    back = unpack_semi_structured(pack_semi_structured(weight))
    assert torch.equal(back, weight)
    assert bool(back[0, 0].signbit())
    assert not bool(back[0, 4].signbit())


def test_weight_that_is_no_contiguous_tensor_packs_as_one_that_is() -> None:
    weight = two_of_four(128, 64).t().contiguous().t()
    assert torch.equal(unpack_semi_structured(pack_semi_structured(weight)), weight)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(32, 64, dtype=torch.float16), "is not 2:4: 512 of 512 groups"),
        (torch.zeros(32, 64), "fp16, bf16 and int8, not float32"),
        (torch.zeros(16, 64, dtype=torch.float16), "out_features to be a multiple of 32 in float16, not 16"),
        (torch.zeros(32, 96, dtype=torch.bfloat16), "in_features to be a multiple of 64 in bfloat16, not 96"),
        (torch.zeros(16, 64, dtype=torch.int8), "in_features to be a multiple of 128 in int8, not 64"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: Tensor, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        pack_semi_structured(weight)


# -- from files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "kept"), [("2:4", 2), ("2:4", 1), ("1:4", 1), ("1:4", 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_stored_weight_is_packed_without_the_dense_one(codec: str, kept: int, dtype: torch.dtype) -> None:
    weight = two_of_four(64, 256, dtype, kept)
    entry, parts = encode(weight, codec)
    assert entry.codec == "n:m"
    packed = from_codec(entry, parts)
    assert packed is not None
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)


def test_stored_weight_in_fp32_is_packed_in_the_type_of_the_model() -> None:
    weight = two_of_four(32, 64, torch.float32)
    entry, parts = encode(weight, "2:4")
    packed = from_codec(entry, parts, torch.bfloat16)
    assert packed is not None
    assert torch.equal(unpack_semi_structured(packed), weight.bfloat16())
    with pytest.raises(BackendError, match="not float32"):
        from_codec(entry, parts)


def test_weight_stored_otherwise_is_left_to_the_decoder() -> None:
    weight = two_of_four(32, 64, kept=1)
    for codec in ("bitmask", "csr"):
        assert from_codec(*encode(weight, codec)) is None


def test_damaged_places_are_found() -> None:
    entry, parts = encode(two_of_four(32, 64), "2:4")
    with pytest.raises(CheckpointError, match="ascending"):
        from_codec(entry, {**parts, "_positions": torch.zeros_like(parts["_positions"])})


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cusparselt")
@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "backend", "reason"),
    [
        ((64, 64), torch.float16, None, "cusparselt", "needs a CUDA device"),
        ((64, 64), torch.float16, (7, 5), "cusparselt", "compute capability 8.0 .* has 7.5"),
        ((64, 64), torch.float16, HOPPER, "cutlass", "8.x alone, and this device has 9.0"),
        ((64, 64), torch.float32, AMPERE, "cusparselt", "keeps one of two"),
        ((64, 64), torch.float32, AMPERE, "cutlass", "keeps one of two"),
        ((64, 64), torch.int8, AMPERE, "cutlass", "int8 needs scales"),
        ((64, 64), torch.float8_e4m3fn, HOPPER, "cusparselt", "float8_e4m3fn needs scales"),
        ((64, 64), torch.float64, AMPERE, "cutlass", "not float64"),
        ((40, 64), torch.float16, AMPERE, "cusparselt", "out_features to be a multiple of 16 in float16, not 40"),
        ((48, 40), torch.bfloat16, AMPERE, "cusparselt", "in_features to be a multiple of 16 in bfloat16, not 40"),
        ((48, 64), torch.float16, AMPERE, "cutlass", "out_features to be a multiple of 32 in float16, not 48"),
        ((32, 96), torch.float16, AMPERE, "cutlass", "in_features to be a multiple of 64 in float16, not 96"),
        ((0, 64), torch.float16, AMPERE, "cutlass", "out_features to be a multiple of 32 in float16, not 0"),
        ((64,), torch.float16, AMPERE, "cutlass", "needs a matrix"),
    ],
)
def test_refusal_says_why(shape: Any, dtype: Any, capability: Any, backend: str, reason: str) -> None:
    found = refusal(shape, dtype, capability, backend)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.usefixtures("cusparselt")
@pytest.mark.parametrize(
    ("capability", "backend"), [(AMPERE, "cutlass"), (AMPERE, "cusparselt"), (HOPPER, "cusparselt")]
)
def test_what_fits_is_not_refused(capability: Any, backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert refusal((768, 3072), dtype, capability, backend, two_of_four(64, 64)) is None


def test_torch_without_cusparselt_is_told_from_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "cusparselt_version", lambda: None)
    assert "without cuSPARSELt" in (refusal((64, 64), torch.float16, HOPPER, "cusparselt") or "")
    assert refusal((64, 64), torch.float16, AMPERE, "cutlass") is None
    assert (default_backend(AMPERE), default_backend(HOPPER)) == ("cutlass", "cusparselt")
    monkeypatch.setattr(semi_structured, "cusparselt_version", lambda: 702)
    assert default_backend(AMPERE) == "cusparselt"


@pytest.mark.usefixtures("cusparselt")
def test_weight_is_looked_at() -> None:
    weight = two_of_four(64, 64)
    weight[17, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    found = refusal((64, 64), torch.float16, AMPERE, "cusparselt", weight)
    assert found is not None
    assert "1 of 1024 groups" in found
    assert "row 17, columns 8 to 11" in found
    # torch itself packs it, and what comes back is another weight.
    assert not torch.equal(
        sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight)), weight
    )
    weight[17, 8] = 0
    weight[0, 0] = float("inf")
    weight[0, 1:4] = 0
    assert "inf or NaN" in (refusal((64, 64), torch.float16, AMPERE, "cusparselt", weight) or "")
    assert "meta device" in (refusal((64, 64), torch.float16, AMPERE, "cusparselt", weight.to("meta")) or "")


def test_unknown_backend_is_an_error() -> None:
    with pytest.raises(BackendError, match="cusparselt, cutlass, not 'marlin'"):
        refusal((64, 64), torch.float16, AMPERE, "marlin")


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert "ROCm" in (refusal((64, 64), torch.float16, (9, 4), "cusparselt") or "")


# -- the layer -------------------------------------------------------------------------------------------------------


def layer_of(weight: Tensor, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_computes_what_the_dense_one_does(shape: tuple[int, ...], bias: bool) -> None:
    layer = layer_of(two_of_four(32, 64), bias=bias)
    packed = SemiStructuredLinear.from_packed(pack_semi_structured(layer.weight), layer.bias)
    x = torch.randn(shape).half()
    assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["cutlass", "cusparselt"])
def test_small_batches_are_padded_and_cut_back(
    monkeypatch: pytest.MonkeyPatch, tokens: int, bias: bool, layout: str
) -> None:
    layer = layer_of(two_of_four(32, 64), bias=bias)
    packed = pack_semi_structured(layer.weight)
    seen: list[Tensor] = []

    def multiply(x: Tensor, values: Tensor, meta: Tensor | None, added: Tensor | None) -> Tensor:
        seen.append(x)
        assert values.dtype == x.dtype
        assert (meta is None) == (layout == "cusparselt")
        return F.linear(x, unpack_semi_structured(packed), added)

    monkeypatch.setattr(semi_structured, "_multiply", multiply)
    monkeypatch.setattr(semi_structured, "_plain", lambda x: False)  # as if it were on a GPU
    made = SemiStructuredLinear.from_packed(packed, layer.bias)
    if layout == "cusparselt":
        made.meta = None
    x = torch.randn(tokens, 64).half()
    assert torch.equal(made(x), layer(x))
    assert [tuple(x.shape) for x in seen] == [(-(-tokens // 8) * 8, 64)]
    assert not seen[0][tokens:].any()
    assert seen[0].is_contiguous()


def test_rules_for_the_batch_are_those_of_torch() -> None:
    for cls in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        for dtype in semi_structured.FLOATS:
            assert cls._DTYPE_SHAPE_CONSTRAINTS[dtype].dense_min_rows == 8


def test_dense_layer_comes_back() -> None:
    layer = layer_of(two_of_four(32, 128, torch.bfloat16))
    back = SemiStructuredLinear.from_packed(pack_semi_structured(layer.weight), layer.bias).to_linear()
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(back.bias, layer.bias)
    assert back.weight.requires_grad


def test_layer_survives_copies_pickles_and_state_dicts() -> None:
    layer = layer_of(two_of_four(32, 64))
    made = SemiStructuredLinear.from_packed(pack_semi_structured(layer.weight), layer.bias)
    x = torch.randn(3, 64).half()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301  our own bytes
        assert torch.equal(other(x), layer(x))
    blank = SemiStructuredLinear.from_packed(pack_semi_structured(torch.zeros(32, 64).half()), torch.zeros(32).half())
    blank.load_state_dict(made.state_dict())
    assert torch.equal(blank(x), layer(x))


def test_cast_after_packing_is_refused_and_destroys_nothing() -> None:
    layer = layer_of(two_of_four(32, 64))
    made = SemiStructuredLinear.from_packed(pack_semi_structured(layer.weight), layer.bias)
    made.to(torch.bfloat16)
    with pytest.raises(BackendError, match="packed in float16"):
        made(torch.randn(3, 64).bfloat16())
    assert torch.equal(made.to_linear().weight, layer.weight)


def test_layer_on_the_cpu_is_refused() -> None:
    with pytest.raises(BackendError, match="needs a CUDA device"):
        SemiStructuredLinear.from_linear(layer_of(two_of_four(32, 64)))


def test_op_is_seen_through_by_torch() -> None:
    layer = layer_of(two_of_four(32, 64))
    made = SemiStructuredLinear.from_packed(pack_semi_structured(layer.weight), layer.bias)
    x = torch.randn(3, 64).half()
    torch.library.opcheck(
        semi_structured.semi_structured_linear, (x, made.packed, made.meta, made.bias, 32), raise_exception=True
    )
    exported = torch.export.export(nn.Sequential(made), (x,))
    assert torch.equal(exported.module()(x), layer(x))
