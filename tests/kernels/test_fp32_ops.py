"""Every product against fp64: each instruction set of this machine, and plain torch."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from hf_sparse.errors import BackendError
from hf_sparse.kernels import PackedWeight, pack
from hf_sparse.kernels import fp32_ops as ops
from hf_sparse.kernels import reference as fallback
from hf_sparse.kernels.types import ACTIVATIONS, Norm, Weight
from tests.helpers.kernels import NATIVE, WAYS, masks, odd_inputs, sparse, use_way


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    use_way(monkeypatch, ops, request.param)
    return request.param


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return fallback.activate(y, activation)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (33, 129), (64, 256), (45, 301)])
def test_linear_matches_fp64(way, rows, shape):
    out, width = shape
    for tokens in (1, 2, 3, 9, 16, 33, 64, 130):
        for zeros in (0.0, 0.9, 1.0):
            weight, bias = sparse(out, width, zeros), torch.randn(out)
            x = torch.randn(tokens, width)
            close(ops.linear(x, pack(weight, rows), bias), reference(x, weight, bias, "none"))


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_fp64(way, rows, activation):
    weight = torch.eye(37)
    for x in (torch.linspace(-12, 12, 40 * 37).view(40, 37), torch.randn(1, 37), torch.full((3, 37), -100.0)):
        found = ops.linear(x, pack(weight, rows), None, activation)
        torch.testing.assert_close(found.double(), reference(x, weight, None, activation), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_one_token_and_singles_however_many_a_row_has(way, width):
    """Rows from empty to full in every order: their values are multiplied together and summed apart."""
    for rows in (1, 15, 16, 17, 64, 65, 200):
        kept = torch.arange(width) < torch.randint(0, width + 1, (rows, 1))
        weight = torch.randn(rows, width) * kept[:, torch.randperm(width)]
        weight[rows // 2] = 1.0
        x, bias = torch.randn(1, width), torch.randn(rows)
        close(ops.linear(x, pack(weight), bias), reference(x, weight, bias, "none"))


def test_one_token_and_rows_longer_than_their_chunk(way):
    """`pack` makes no weight with a column twice, but every one counts, and none is written out of bounds."""
    if way == "torch":
        pytest.skip("torch sets the weight instead")
    counts = torch.tensor([9000, 0, 3, 5000, *[400] * 16])
    total = int(counts.sum())
    values, columns = torch.randn(total, 1), torch.randint(0, 50, (total,)).to(torch.uint8)
    pointers = torch.cat([torch.zeros(1), counts.cumsum(0)])[None].to(torch.int32)
    x = torch.randn(1, 50)
    found = torch.ops.hf_sparse.sparse_linear(x, values, columns, pointers, None, 1, len(counts), 50)
    each = (values[:, 0] * x[0, columns.long()]).double()
    wanted = torch.stack([part.sum() for part in each.split(counts.tolist())])[None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 4])
def test_long_input(way, rows):
    weight, x = sparse(40, 64, 0.9), torch.randn(4097, 64)
    close(ops.linear(x, pack(weight, rows)), reference(x, weight, None, "none"))


def test_leading_shapes_zero_batches_and_strides(way):
    weight = sparse(20, 30, 0.5)
    packed = pack(weight, 2)
    for x in odd_inputs():
        close(ops.linear(x, packed), reference(x, weight, None, "none"))


def test_weights_without_outputs_or_inputs(way):
    assert ops.linear(torch.randn(5, 7), pack(torch.zeros(0, 7))).shape == (5, 0)
    assert torch.equal(ops.linear(torch.randn(5, 0), pack(torch.zeros(3, 0)), torch.ones(3)), torch.ones(5, 3))


@pytest.mark.parametrize(
    ("rows", "threads"), [((1, 1), 1), ((4, 4), 1), ((16, 16), 1), ((1, 4), 1), ((8, 2), 1), ((1, 1), 2), ((4, 16), 2)]
)
def test_ffn_matches_fp64(way, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width, hidden, out in ((50, 131, 33), (128, 300, 128), (7, 1, 3)):
            up, down = sparse(hidden, width, 0.8), sparse(out, hidden, 0.8)
            gate = sparse(hidden, width, 0.8)
            b, c = torch.randn(hidden), torch.randn(out)
            packed, back, first = pack(up, rows[0]), pack(down, rows[1]), pack(gate, rows[0])
            for tokens in (0, 1, 9, 33, 130):
                x = torch.randn(tokens, width)
                h = reference(x, up, b, "gelu")
                close(ops.ffn(x, packed, b, back, c, "gelu"), F.linear(h, down.double(), c.double()))
                h = reference(x, gate, None, "gelu_tanh") * reference(x, up, None, "none")
                close(ops.gated_ffn(x, first, packed, back), F.linear(h, down.double()))
    finally:
        torch.set_num_threads(before)


def normed(x, y, norm):
    weight, bias, eps = norm
    return F.layer_norm(x.double() + y, x.shape[-1:], weight.double(), None if bias is None else bias.double(), eps)


@pytest.mark.parametrize(("rows", "threads"), [((1, 1), 1), ((4, 16), 1), ((8, 2), 2), ((1, 4), 3)])
def test_whole_sub_blocks_match_fp64(way, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width, hidden, heads, size in ((50, 131, 3, 16), (128, 700, 2, 64), (33, 1, 1, 5)):
            up, down, inner = sparse(hidden, width, 0.8), sparse(width, hidden, 0.8), heads * size
            qkv, out = 0.3 * sparse(3 * inner, width, 0.8), sparse(width, inner, 0.8)
            b, c, d = torch.randn(hidden), torch.randn(width), torch.randn(3 * inner)
            up_, down_, qkv_, out_ = pack(up, rows[0]), pack(down, rows[1]), pack(qkv, rows[0]), pack(out, rows[1])
            for norm in (Norm(torch.randn(width), torch.randn(width), 1e-5), Norm(torch.randn(width), None, 0.1)):
                for batch, length in ((0, 20), (1, 1), (2, 15), (1, 16), (3, 17), (2, 64), (1, 130)):
                    x = torch.randn(batch, length, width)
                    y = F.linear(reference(x, up, b, "gelu"), down.double(), c.double())
                    close(ops.ffn_norm(x, up_, b, down_, c, norm), normed(x, y, norm))
                    y = F.linear(attend(x, qkv, d, heads, None, 0.2), out.double(), c.double())
                    close(ops.attention_norm(x, qkv_, d, out_, c, norm, heads, None, 0.2), normed(x, y, norm))
    finally:
        torch.set_num_threads(before)


def test_attention_without_features_is_its_bias_and_the_input(way):
    x, norm, bias = torch.randn(2, 20, 8), Norm(torch.ones(8), None, 0.1), torch.randn(8)
    found = ops.attention_norm(x, pack(torch.zeros(0, 8)), None, pack(torch.zeros(8, 0)), bias, norm, 2)
    close(found, normed(x, bias.double().expand(2, 20, 8), norm))


@pytest.mark.parametrize("norm", [Norm(torch.ones(7), None, 0.1), Norm(torch.ones(8), torch.ones(1), 0.1),
                                  (torch.ones(8).double(), None, 0.1),
                                  (torch.ones(8, device="meta"), None, 0.1)])  # fmt: skip
def test_norms_that_do_not_fit_are_refused(norm):
    x, eye, qkv = torch.randn(1, 20, 8), pack(torch.eye(8)), pack(torch.randn(24, 8))
    with pytest.raises(BackendError, match="layer norm"):
        ops.ffn_norm(x, eye, None, eye, None, norm)
    with pytest.raises(BackendError, match="layer norm"):
        ops.attention_norm(x, qkv, None, eye, None, norm, 2)


def test_ffn_without_an_activation(way):
    up, down, x = sparse(40, 30, 0.5), sparse(30, 40, 0.5), torch.randn(17, 30)
    wanted = x.double() @ up.double().T @ down.double().T
    close(ops.ffn(x, pack(up), None, pack(down), None, "none"), wanted)


def attend(x, weight, bias, heads, mask, scale):
    return fallback.attention(reference(x, weight, bias, "none"), heads, mask, scale)


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (4, 1), (16, 1), (1, 2), (4, 3)])
def test_attention_matches_fp64(way, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for heads, size, width in ((3, 16, 50), (1, 5, 33), (2, 64, 128)):
            weight, bias = 0.3 * sparse(3 * heads * size, width, 0.8), torch.randn(3 * heads * size)
            packed = pack(weight, rows)
            for batch, length in ((1, 1), (2, 15), (1, 16), (3, 17), (3, 33), (2, 64), (1, 130), (0, 20), (2, 0)):
                x = torch.randn(batch, length, width)
                wanted = attend(x, weight, bias, heads, None, size**-0.5)
                close(ops.attention(x, packed, bias, heads), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("length", [7, 33, 70])
def test_attention_with_a_mask(way, length):
    weight = 0.3 * sparse(3 * 2 * 8, 30, 0.5)
    packed, x = pack(weight, 4), torch.randn(3, length, 30)
    for mask in masks(length):
        exact = mask if mask.dtype == torch.bool else mask.double()
        close(ops.attention(x, packed, None, 2, mask, 0.3), attend(x, weight, None, 2, exact, 0.3))


def test_attention_that_may_see_nothing_gives_zeros(way):
    packed, x = pack(torch.randn(3 * 2 * 8, 30)), torch.randn(1, 40, 30)
    seen = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    seen[0, 0, 7] = False
    y = ops.attention(x, packed, None, 2, seen)
    assert torch.equal(y[0, 7], torch.zeros(16))
    assert bool(y[0, 8].count_nonzero() == 16)


def test_attention_of_large_scores_does_not_overflow(way):
    weight, x = torch.randn(3 * 8, 30), 3 * torch.randn(2, 33, 30)  # scores of some hundreds
    found, wanted = ops.attention(x, pack(weight), None, 1), attend(x, weight, None, 1, None, 8**-0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.05)


def test_attention_of_a_long_and_scattered_input(way):
    weight, x = 0.3 * sparse(3 * 8, 16, 0.5), torch.randn(1, 4097, 32)[..., ::2]
    close(ops.attention(x, pack(weight, 4), None, 1), attend(x, weight, None, 1, None, 8**-0.5))


@pytest.mark.parametrize(
    ("x", "heads", "mask", "said"),
    [
        (torch.randn(20, 6), 1, None, "batch, length"),
        (torch.randn(1, 20, 6), 0, None, "0 heads"),
        (torch.randn(1, 20, 6), 4, None, "4 heads"),
        (torch.randn(2, 20, 6), 1, torch.zeros(3, 1, 20, 20), "mask of shape"),
        (torch.randn(2, 20, 6), 1, torch.zeros(2, 1, 20, 19), "mask of shape"),
        (torch.randn(2, 20, 6), 1, torch.zeros(2, 20, 20), "mask of shape"),
        (torch.randn(2, 20, 6), 1, torch.zeros(2, 1, 20, 20).long(), "mask of shape"),
        (torch.randn(2, 20, 5), 1, None, "6 inputs"),
    ],
)
def test_attention_that_does_not_fit_is_refused(x, heads, mask, said):
    with pytest.raises(BackendError, match=said):
        ops.attention(x, pack(torch.eye(6)), None, heads, mask)


def test_a_zero_weight_ignores_what_is_not_finite_and_a_nonzero_one_passes_it_on(way):
    weight = torch.zeros(2, 40)
    weight[1, 3] = 2.0
    x = torch.ones(20, 40)
    x[:, 7] = float("nan")
    x[5, 3] = float("nan")
    y = ops.linear(x, pack(weight), None, "relu")
    if way != "torch":  # its dense product gives NaN
        assert torch.equal(y[:, 0], torch.zeros(20))
    assert y[5, 1].isnan()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kept", [1, 15, 17, 33])
def test_one_token_ignores_what_is_not_finite_where_no_weight_is(way, rows, kept):
    weight, x = torch.zeros(5, 140), torch.randn(1, 140)
    weight[:, 1 : kept + 1] = 1.0
    for column in (0, 127, 128):  # what a register that is not full might read
        x[0, column] = float("inf")
    y = ops.linear(x, pack(weight, rows))
    if way != "torch":
        torch.testing.assert_close(y[0], x[0, 1 : kept + 1].sum().expand(5))


def test_other_types_are_computed_in_torch():
    weight, x = sparse(9, 20, 0.5), torch.randn(4, 20)
    for dtype in (torch.float64, torch.bfloat16):
        y = ops.linear(x.to(dtype), pack(weight))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=2e-2, atol=5e-2)


def test_the_fallback_sees_a_changed_weight(monkeypatch):
    monkeypatch.setattr(ops, "library", lambda: None)
    packed, x = pack(torch.eye(3)), torch.randn(2, 3)
    assert torch.equal(ops.linear(x, packed), x)
    packed.values.mul_(2)
    assert torch.equal(ops.linear(x, packed), 2 * x)


def test_what_needs_a_gradient_is_refused():
    x, packed = torch.randn(2, 3, requires_grad=True), pack(torch.eye(3))
    with pytest.raises(BackendError, match="no backward"):
        ops.linear(x, packed)
    with pytest.raises(BackendError, match="no backward"):
        ops.ffn(x, packed, None, packed, None)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, packed), x)


@pytest.mark.parametrize("which", ["bias", "norm weight", "norm bias", "mask", "down bias"])
def test_gradients_of_what_is_not_the_input_are_refused_too(which):
    def own(name: str, *shape: int) -> torch.Tensor:
        return torch.ones(shape, requires_grad=name == which)

    x, qkv, square = torch.randn(1, 20, 4), pack(torch.ones(12, 4)), pack(torch.ones(4, 4))
    norm = Norm(own("norm weight", 4), own("norm bias", 4), 1e-5)
    calls = {
        "attention": lambda: ops.attention_norm(
            x, qkv, own("bias", 12), square, own("down bias", 4), norm, 2, own("mask", 1, 1, 1, 20)
        ),
        "ffn": lambda: ops.ffn_norm(x, square, own("bias", 4), square, own("down bias", 4), norm),
    }
    for name, call in calls.items():
        if which == "mask" and name == "ffn":
            continue
        with pytest.raises(BackendError, match="no backward"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize("length", [3, 20])
def test_autocast_around_changes_nothing(way, length):
    # A short attention is torch's own, which autocast would hand on in bfloat16 to a kernel that reads fp32.
    x, qkv, square = torch.randn(2, length, 16), pack(sparse(48, 16, 0.5)), pack(sparse(16, 16, 0.5))
    norm, mask = Norm(torch.randn(16), torch.randn(16), 1e-5), torch.zeros(2, 1, 1, length)
    calls = (
        lambda: ops.linear(x, square),
        lambda: ops.ffn(x, square, None, square, None),
        lambda: ops.gated_ffn(x, square, square, square),
        lambda: ops.attention(x, qkv, None, 2, mask),
        lambda: ops.ffn_norm(x, square, None, square, None, norm),
        lambda: ops.attention_norm(x, qkv, None, square, None, norm, 2, mask),
    )
    for call in calls:
        wanted = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call()
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built: python -m hf_sparse.kernels.build")
def test_library_refuses_what_it_would_read_past_its_end():
    weight = pack(torch.eye(16))
    parts = Weight(*weight.parts, None, 1, 16, 16)
    assert NATIVE is not None
    for x in (torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 16, device="meta")):
        with pytest.raises(BackendError, match="float32 on the CPU"):
            NATIVE.fp32.linear(x, NATIVE.fp32.describe([parts]), "none")


@pytest.mark.parametrize(
    ("x", "bias", "activation", "said"),
    [
        (torch.randn(2, 4), None, "none", "3 inputs"),
        (torch.tensor([1, 2, 3]), None, "none", "floating point"),
        (torch.tensor(1.0), None, "none", "3 inputs"),
        (torch.randn(2, 3), torch.zeros(4), "none", "bias"),
        (torch.randn(2, 3), None, "tanh", "activation"),
    ],
)
def test_what_does_not_fit_is_refused(x, bias, activation, said):
    with pytest.raises(BackendError, match=said):
        ops.linear(x, pack(torch.eye(3)), bias, activation)


@pytest.mark.skipif(NATIVE is None, reason="the C++ kernels are not built: python -m hf_sparse.kernels.build")
@pytest.mark.parametrize("spoilt", [[[0, 900, 2, 3]], [[-7, 1, 2, 3]], [[0, 2, 1, 3]], [[0, 1, 2, 2**31 - 1]]])
def test_hostile_pointers_given_to_the_operator_are_refused(spoilt):
    good = pack(torch.eye(3))
    pointers = torch.tensor(spoilt, dtype=torch.int32)
    with pytest.raises(BackendError, match="pointers"):
        torch.ops.hf_sparse.sparse_linear(torch.randn(2, 3), good.values, good.columns, pointers, None, 1, 3, 3)


def arguments(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    return (
        x,
        packed.values,
        packed.columns,
        packed.pointers,
        bias,
        packed.rows,
        packed.out_features,
        packed.in_features,
    )


def test_operators_pass_the_checks_of_torch(way):
    packed = pack(sparse(20, 30, 0.5), 2)
    torch.library.opcheck(torch.ops.hf_sparse.sparse_linear, arguments(packed, torch.randn(2, 5, 30), torch.randn(20)))
    many = pack(sparse(24, 30, 0.5), 2)
    parts = (many.values, many.columns, many.pointers, None)
    for mask in (None, torch.ones(2, 1, 1, 17, dtype=torch.bool)):
        torch.library.opcheck(
            torch.ops.hf_sparse.sparse_attention, (torch.randn(2, 17, 30), *parts, mask, 2, 24, 30, 2, 0.5)
        )
    back = pack(sparse(30, 20, 0.5))
    torch.library.opcheck(
        torch.ops.hf_sparse.sparse_ffn,
        (
            *(torch.randn(17, 30), packed.values, packed.columns, packed.pointers, None),
            *(back.values, back.columns, back.pointers, torch.randn(30), 2, 1, 20, 30, 30, "gelu"),
        ),
    )
    other, norm = (
        (back.values, back.columns, back.pointers, torch.randn(30)),
        Norm(torch.randn(30), torch.randn(30), 0.1),
    )
    torch.library.opcheck(
        torch.ops.hf_sparse.sparse_ffn_norm,
        (
            torch.randn(17, 30),
            *(packed.values, packed.columns, packed.pointers, None),
            *other,
            *norm,
            2,
            1,
            20,
            30,
            "gelu",
        ),
    )
    many = pack(sparse(60, 30, 0.5), 2)
    three = (many.values, many.columns, many.pointers, torch.randn(60))
    torch.library.opcheck(
        torch.ops.hf_sparse.sparse_attention_norm,
        (
            torch.randn(2, 17, 30),
            *three,
            *other,
            *norm,
            torch.ones(2, 1, 1, 17, dtype=torch.bool),
            2,
            1,
            20,
            30,
            4,
            0.5,
        ),
    )


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = pack(sparse(40, 30, 0.5), 4), pack(sparse(30, 40, 0.5))
        self.qkv, self.out = pack(sparse(90, 30, 0.5)), pack(sparse(30, 30, 0.5), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ops.attention(x, self.qkv, None, 2)
        norm = Norm(torch.ones(30), None, 1e-5)
        x = ops.ffn_norm(
            ops.attention_norm(x, self.qkv, None, self.out, None, norm, 2), self.up, None, self.down, None, norm
        )
        return ops.linear(ops.ffn(x.relu(), self.up, None, self.down, None), self.up) + 1


def test_compile_sees_through():
    torch._dynamo.reset()
    block, x = Block(), torch.randn(3, 20, 30)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x))
        torch.testing.assert_close(compiled(x[:, :7]), block(x[:, :7]))


def test_export_sees_through():
    block, x = Block(), torch.randn(3, 20, 30)
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=99)},))
        assert "sparse_ffn" in str(program.graph)
        torch.testing.assert_close(program.module()(x[:, :9]), block(x[:, :9]))


def test_two_threads_at_once(way):
    weights = [sparse(200, 300, 0.8), sparse(100, 300, 0.5)]
    packed, x = [pack(weight) for weight in weights], torch.randn(150, 300)
    wanted = [reference(x, weight, None, "none") for weight in weights]
    failures: list[Exception] = []

    def work(i: int) -> None:
        try:
            for _ in range(20):
                close(ops.linear(x, packed[i]), wanted[i])
        except Exception as error:  # noqa: BLE001  handed to the test
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
