"""Load the C++ library, say what was found, and call it with tensors. ctypes releases the GIL around each call."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # before the library: both then share one OpenMP and its threads
from torch import Tensor

from ..errors import BackendError
from .fp32_layout import chunk_width
from .types import ACTIVATIONS, Norm, Weight

TARGET = Path(__file__).with_name("_cpu.so")
"""The library. build.py has both names too: importing it here would make `python -m hf_sparse.kernels.build` warn."""

LOG = TARGET.with_name("_cpu.log")
"""Why there is no library, written by setup.py."""

ISA_VARIABLE = "HF_SPARSE_ISA"
"""Environment variable that names the instruction set to use, or `none` for plain torch."""

_BUILD = "python -m hf_sparse.kernels.build (needs g++ or clang++)"


@dataclass(frozen=True)
class LibraryStatus:
    """What `library_status` found: `available`, where the file is, the instruction set in use, and a line in words."""

    available: bool
    path: str | None
    isa: str | None
    message: str


class _Weight(ctypes.Structure):
    """`Weight` of csrc/kernels.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("pointers", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
    )


class NormStructure(ctypes.Structure):
    """`Norm` of csrc/kernels.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class Library:
    """The loaded library and the instruction set to call it with.

    Args:
        path: of the shared library.
        isa: one of `isas`; the best one by default.

    Raises:
        BackendError: it cannot be loaded, or this processor lacks the instruction set.
    """

    def __init__(self, path: str, isa: str | None = None) -> None:
        try:
            self._c = ctypes.CDLL(path)
            self._declare()
        except (OSError, AttributeError) as error:
            raise BackendError(
                f"the C++ kernels at {path} cannot be loaded ({error}); rebuild them: {_BUILD}"
            ) from error
        self.path = path
        self.shares = bool(self._c.hf_sparse_shares())
        self.isas: dict[str, int] = {}
        place = 0
        while (name := self._c.hf_sparse_isa(place)) != b"":
            if name is not None:
                self.isas[name.decode()] = place
            place += 1
        self.isa = isa or next(iter(self.isas))
        if self.isa not in self.isas:
            raise BackendError(
                f"the C++ kernels were asked for {self.isa!r} ({ISA_VARIABLE}); this processor can do "
                f"{', '.join(self.isas)}, and 'none' means plain torch"
            )

    def _declare(self) -> None:
        # A name that is missing means that the library is of another version of the sources.
        self._c.hf_sparse_isa.restype = ctypes.c_char_p
        self._c.hf_sparse_shares.argtypes = []
        pointer, weight, norm = ctypes.c_void_p, ctypes.POINTER(_Weight), ctypes.POINTER(NormStructure)
        tail = [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32]
        self._c.hf_sparse_linear.argtypes = [ctypes.c_int, weight, pointer, pointer, *tail]
        self._c.hf_sparse_ffn.argtypes = [ctypes.c_int, weight, weight, weight, norm, pointer, pointer, *tail]
        self._c.hf_sparse_attention.argtypes = [
            *(ctypes.c_int, weight, weight, norm, pointer, pointer, pointer),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_int32),
        ]

        self._c.hf_sparse_dense.argtypes = [ctypes.c_int, *[pointer] * 4, *[ctypes.c_int64] * 3, ctypes.c_int32]

    def linear(self, x: Tensor, weight: Weight, activation: str) -> Tensor:
        """Compute one product; x in fp32 on the CPU."""
        x = _readable(x)
        y = x.new_empty((*x.shape[:-1], weight[5]))
        structure, _keep = _structure(weight)
        result = self._c.hf_sparse_linear(
            self.isas[self.isa], structure, x.data_ptr(), y.data_ptr(), *_tail(x, activation)
        )
        return _checked(result, y)

    def ffn(self, x: Tensor, weights: list[Weight], activation: str, norm: Norm | None = None) -> Tensor:
        """Compute (gate,) up and down, tile by tile; with a norm, that of the sum of x and what comes out."""
        x = _readable(x)
        y = x.new_empty((*x.shape[:-1], weights[-1][5]))
        parts = [_structure(weight) for weight in weights]
        structures = [part[0] for part in parts]
        second = structures[1] if len(parts) == 3 else None
        normed, _keep = norm_structure(norm)
        result = self._c.hf_sparse_ffn(
            *(self.isas[self.isa], structures[0], second, structures[-1], normed),
            *(x.data_ptr(), y.data_ptr(), *_tail(x, activation)),
        )
        return _checked(result, y)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the product of a few tokens with a dense weight; weight and bias contiguous."""
        x = _readable(x)
        out, width = weight.shape
        y = x.new_empty((*x.shape[:-1], out))
        result = self._c.hf_sparse_dense(
            *(self.isas[self.isa], weight.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr()),
            *(y.data_ptr(), x.shape[:-1].numel(), width, out, torch.get_num_threads()),
        )
        return _checked(result, y)

    def attention(
        self,
        x: Tensor,
        weight: Weight,
        mask: Tensor | None,
        heads: int,
        scale: float,
        output: Weight | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """Compute self-attention; x (batch, length, in), mask (1 or batch, length, length) to be added, or None.

        With an output weight, the product with it; with a norm, that of the sum of x and what comes out.
        """
        x = _readable(x)
        batch, length = x.shape[:2]
        y = x.new_empty((batch, length, weight[5] // 3 if output is None else output[5]))
        structure, _keep = _structure(weight)
        after, _bias = (None, None) if output is None else _structure(output)
        normed, _parts = norm_structure(norm)
        mask = None if mask is None else mask.contiguous()
        step = length * length if mask is not None and mask.shape[0] > 1 else 0
        result = self._c.hf_sparse_attention(
            *(self.isas[self.isa], structure, after, normed, x.data_ptr(), y.data_ptr()),
            *(None if mask is None else mask.data_ptr(), step, batch, length, heads, scale, torch.get_num_threads()),
        )
        return _checked(result, y)


def library_status() -> LibraryStatus:
    """Say whether the C++ kernels were found, where, and what they use here; or why not, and how to get them."""
    library, why = _load()
    if library is None:
        return LibraryStatus(False, None, None, f"{why}; sparse products run in plain torch, slower")
    threads = "" if library.shares else ", on one thread: they were built without OpenMP"
    return LibraryStatus(
        True, library.path, library.isa, f"C++ kernels at {library.path}, using {library.isa}{threads}"
    )


def library() -> Library | None:
    """Give the library, or None where there is none."""
    return _load()[0]


@cache
def _load() -> tuple[Library | None, str]:
    isa = os.environ.get(ISA_VARIABLE)
    if isa == "none":
        return None, f"the C++ kernels are switched off by {ISA_VARIABLE}=none"
    if not TARGET.exists():
        said = LOG.read_text(encoding="utf-8").strip() if LOG.exists() else ""
        reason = f" (at install: {said})" if said else ""
        return None, f"the C++ kernels are not built{reason}; build them with {_BUILD}"
    try:
        return Library(str(TARGET), isa), ""
    except BackendError as error:
        return None, str(error)


def _structure(weight: Weight) -> tuple[_Weight, Tensor | None]:
    """Give the C structure, and the bias that has to live as long."""
    values, columns, pointers, bias, rows, out_features, in_features = weight
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    at = None if bias is None else bias.data_ptr()
    return _Weight(
        *(values.data_ptr(), columns.data_ptr(), pointers.data_ptr(), at, columns.numel()),
        *(rows, out_features, in_features, chunk_width(in_features, pointers.shape[0])),
    ), bias


def norm_structure(norm: Norm | None) -> tuple[NormStructure | None, tuple[Tensor | None, ...]]:
    """Give the C structure, and the tensors that have to live as long."""
    if norm is None:
        return None, ()
    weight, bias, eps = norm
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return NormStructure(weight.data_ptr(), None if bias is None else bias.data_ptr(), eps), (weight, bias)


def _readable(x: Tensor) -> Tensor:
    """Give an input as the kernels read it: another type would be read, and written, past its end."""
    if x.dtype != torch.float32 or not x.is_cpu:
        raise BackendError(f"the C++ products take float32 on the CPU, not {x.dtype} on {x.device}")
    return x.contiguous()


def _tail(x: Tensor, activation: str) -> tuple[int, int, int]:
    tokens = x.shape[:-1].numel()
    return tokens, ACTIVATIONS.index(activation), torch.get_num_threads()


def _checked(result: int, y: Tensor) -> Tensor:
    if result == 1:
        raise BackendError("the pointers of a packed weight run backwards or past its blocks: pack the weight again")
    if result:
        reason = {2: "not enough memory for a tile", 3: "arguments that do not fit together"}.get(result, str(result))
        raise BackendError(f"a C++ sparse product failed: {reason}")
    return y
