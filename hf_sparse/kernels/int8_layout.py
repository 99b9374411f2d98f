"""The packed layout of int8 weights: rows x 1 blocks in fours, each output in steps of its own size.

Group after group of `rows` outputs, every column that holds a nonzero is kept, in fours ("quads", filled with zeros),
because instructions multiply four bytes of inputs by four of weights. An output is its steps times its scale. The
layout is the same for all instruction sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BackendError
from .fp32_layout import check_matrix
from .types import Packed

ROWS = (1, 2, 4)
"""Block heights of the kernels."""

MAX_INPUTS = 65_536
"""The sums of more bytes could overflow int32."""

STEPS = 127
"""Steps from zero to the largest weight of an output, and to the largest feature of a token."""

NOTHING = 1e-30
"""A token or an output whose numbers are all smaller counts as zeros."""


@dataclass(frozen=True)
class PackedInt8(Packed):
    """A sparse weight in int8; made by `pack_int8`.

    Shapes:
        values: (quads, rows, 4), int8.
        columns: (quads, 4), uint16.
        pointers: (groups + 1,), int32: group g has the quads from [g] to [g + 1].
        scales: (out,), fp32: what a step of an output is worth.
        offsets: (out,), int32: -128 times the sum of its steps, for the kernels that hold inputs plus 128 (VNNI).

    Raises:
        BackendError: the tensors do not fit together.
    """

    operators: ClassVar[str] = "int8"
    values: Tensor
    columns: Tensor
    pointers: Tensor
    scales: Tensor
    offsets: Tensor
    rows: int
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        check_int8(self.parts, self.rows, self.out_features, self.in_features)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All its tensors, in the order of the operators."""
        return self.values, self.columns, self.pointers, self.scales, self.offsets


def pack_int8(weight: Tensor, rows: int = 4) -> PackedInt8:
    """Round a weight to int8, each output to steps of its largest weight / 127, and pack it.

    Args:
        weight: fp32; not changed.
        rows: height of a block, one of `ROWS`; other numbers of outputs are padded inside.

    Shapes:
        weight: (out, in).

    Raises:
        BackendError: not a matrix of finite fp32, too many inputs, or a height that the kernels do not have.

    Example:
        >>> packed = pack_int8(torch.tensor([[0.0, 1.27], [0.0, 0.25]]), rows=2)
        >>> packed.columns.tolist(), packed.values[..., 0].tolist(), packed.offsets.tolist()
        ([[1, 0, 0, 0]], [[127, 127]], [-16256, -16256])
    """
    check_matrix("pack_int8", weight, rows, ROWS)
    weight = weight.detach()
    out, width = weight.shape
    if why := refusal(weight):
        raise BackendError(f"pack_int8 cannot take this weight: {why}")
    largest = weight.abs().amax(dim=1) if width else weight.new_zeros(out)
    scales = torch.where(largest < NOTHING, 0.0, largest / STEPS)
    steps = torch.where(largest < NOTHING, 0.0, STEPS / largest)[:, None] * weight
    groups = -(-out // rows)
    padded = torch.nn.functional.pad(steps.round(), (0, 0, 0, groups * rows - out)).view(groups, rows, width)
    kept = (padded != 0).any(dim=1)
    counts = kept.sum(dim=1)
    pointers = torch.nn.functional.pad(((counts + 3) // 4).cumsum(0), (1, 0))
    group, column = kept.nonzero(as_tuple=True)
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    slot = pointers[group] * 4 + torch.arange(len(group)) - before[group]
    quads = int(pointers[-1])
    columns, values = torch.zeros(quads * 4, dtype=torch.int32), torch.zeros(quads * 4, rows, dtype=torch.int8)
    columns[slot] = column.to(torch.int32)
    values[slot] = padded[group, :, column].to(torch.int8)
    return PackedInt8(
        values=values.view(quads, 4, rows).transpose(1, 2).contiguous(),
        columns=columns.view(quads, 4).to(torch.uint16),
        pointers=pointers.to(torch.int32),
        scales=scales,
        offsets=(-128 * steps.round().sum(dim=1, dtype=torch.float64)).to(torch.int32),
        rows=rows,
        out_features=out,
        in_features=width,
    )


def refusal(weight: Tensor) -> str | None:
    """Return why a matrix cannot be packed in int8, or None."""
    if weight.shape[1] > MAX_INPUTS:
        return f"it has {weight.shape[1]} inputs, and int32 holds the sums of at most {MAX_INPUTS}"
    if not bool(weight.isfinite().all()):
        return "it holds infinities or NaN, which int8 cannot represent"
    return None


def unpack_int8(packed: PackedInt8) -> Tensor:
    """Return the weight that the kernels multiply by: rounded, and dense."""
    return dense_int8(*packed.parts[:4], packed.rows, packed.out_features, packed.in_features)


def dense_int8(
    values: Tensor, columns: Tensor, pointers: Tensor, scales: Tensor, rows: int, out_features: int, in_features: int
) -> Tensor:
    """Write the quads into zeros; the parts of a `PackedInt8` one by one, as the operators have them."""
    groups = torch.repeat_interleave(torch.arange(len(pointers) - 1, device=values.device), pointers.long().diff())
    weight = scales.new_zeros(len(pointers) - 1, in_features, rows)
    # Added up: the columns that fill up a quad are repetitions, with zeros.
    weight.index_put_((groups[:, None], columns.long()), values.transpose(1, 2).to(weight.dtype), accumulate=True)
    weight = weight.transpose(1, 2).reshape((len(pointers) - 1) * rows, in_features)[:out_features]
    return weight * scales[:, None]


def check_int8(parts: tuple[Tensor, ...], rows: int, out_features: int, in_features: int) -> None:
    """Refuse tensors whose shapes, types or memory do not fit together; reads no element, so it is cheap."""
    if rows not in ROWS or out_features < 0 or not 0 <= in_features <= MAX_INPUTS:
        raise BackendError(
            f"an int8 weight must have blocks of {', '.join(map(str, ROWS))} rows and at most {MAX_INPUTS} inputs, got "
            f"shape ({out_features}, {in_features}) in blocks of {rows} rows"
        )
    quads = parts[0].shape[0] if parts[0].dim() else 0
    expected = {
        "values": ((quads, rows, 4), torch.int8),
        "columns": ((quads, 4), torch.uint16),
        "pointers": ((-(-out_features // rows) + 1,), torch.int32),
        "scales": ((out_features,), torch.float32),
        "offsets": ((out_features,), torch.int32),
    }
    for part, (name, (shape, dtype)) in zip(parts, expected.items(), strict=True):
        if part.shape != shape or part.dtype != dtype or not part.is_contiguous():
            raise BackendError(
                f"the {name} of an int8 weight of shape ({out_features}, {in_features}) are {tuple(part.shape)} "
                f"{part.dtype}{'' if part.is_contiguous() else ', not contiguous'}, where {shape} {dtype} belong: "
                "make it with hf_sparse.kernels.pack_int8"
            )
