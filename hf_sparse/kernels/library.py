"""Load the C++ library, report its status, and call it with tensors. ctypes releases the GIL around each call."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch  # before the library: both then share one OpenMP and its threads
from torch import Tensor

from ..errors import BackendError
from .c_structures import (
    CInt8Weight,
    CStructure,
    CWeight,
    Described,
    argument_types,
    fp32_structure,
    int8_structure,
    norm_structure,
    with_bias,
)
from .types import ACTIVATIONS, AnyWeight, Norm

logger = logging.getLogger(__name__)

TARGET = Path(__file__).with_name("_cpu.so")
"""The library. build.py has both names too: importing it here would make `python -m hf_sparse.kernels.build` warn."""

LOG = TARGET.with_name("_cpu.log")
"""Why there is no library, written by setup.py."""

ISA_VARIABLE = "HF_SPARSE_ISA"
"""Environment variable that names the instruction set to use, or `none` for plain torch."""

_BUILD = "python -m hf_sparse.kernels.build (needs g++ or clang++)"


@dataclass(frozen=True)
class LibraryStatus:
    """Result of `library_status`: whether the kernels are available, their file, instruction set and a message."""

    available: bool
    path: str | None
    isa: str | None
    message: str


class NativeOps:
    """The C functions of one weight format, called with tensors: x in fp32 on the CPU.

    Args:
        functions: linear, ffn and attention.
        structure: makes the C structure of a weight, without its bias.
    """

    def __init__(self, functions: Sequence[Callable[..., int]], structure: Callable[[Any], CStructure]) -> None:
        self._linear, self._ffn, self._attention = functions
        self._structure = structure

    def describe(self, weights: Sequence[AnyWeight], norm: Norm | None = None) -> Described:
        """Return weights, and a layer norm, as the functions take them."""
        made = [with_bias(self._structure(weight), weight.bias) for weight in weights]
        normed, kept = norm_structure(norm)
        return Described(
            structures=tuple(each for each, _ in made),
            in_features=weights[0].in_features,
            out_features=tuple(weight.out_features for weight in weights),
            norm=normed,
            kept=(*(bias for _, bias in made), *kept),
        )

    def linear(self, x: Tensor, described: Described, activation: str) -> Tensor:
        """Compute one linear layer, the first one, and its activation."""
        x = readable(x)
        y = x.new_empty((*x.shape[:-1], described.out_features[0]))
        return checked(self._linear(described.structures[0], x.data_ptr(), y.data_ptr(), *_tail(x, activation)), y)

    def ffn(self, x: Tensor, described: Described, activation: str) -> Tensor:
        """Compute (gate,) up and down, tile by tile; with a norm, that of the sum of x and the output."""
        x = readable(x)
        y = x.new_empty((*x.shape[:-1], described.out_features[-1]))
        first, *between, last = described.structures
        result = self._ffn(
            *(first, between[0] if between else None, last, described.norm),
            *(x.data_ptr(), y.data_ptr(), *_tail(x, activation)),
        )
        return checked(result, y)

    def attention(self, x: Tensor, described: Described, mask: Tensor | None, heads: int, scale: float) -> Tensor:
        """Compute self-attention; x (batch, length, in), mask (1 or batch, length, length) to be added, or None.

        With a second weight, that of the output layer, its output; with a norm, that of the sum of x and the output.
        """
        x = readable(x)
        batch, length = x.shape[:2]
        first, output = (*described.structures, None)[:2]
        out_features = described.out_features[0] // 3 if output is None else described.out_features[1]
        y = x.new_empty((batch, length, out_features))
        mask = None if mask is None else mask.contiguous()
        step = length * length if mask is not None and mask.shape[0] > 1 else 0
        result = self._attention(
            *(first, output, described.norm, x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr()),
            *(step, batch, length, heads, scale, torch.get_num_threads()),
        )
        return checked(result, y)


class Library:
    """The loaded library and the instruction set to call it with.

    Args:
        path: of the shared library.
        isa: one of `isas`; the best one by default.

    Attributes:
        fp32: operators of `Weight`.
        int8: operators of `Int8Weight`; None where the instruction set, or this processor, has none.

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
        self.parallel = bool(self._c.hf_sparse_shares())
        self.isas: dict[str, int] = {}
        index = 0
        while (name := self._c.hf_sparse_isa(index)) != b"":
            if name is not None:
                self.isas[name.decode()] = index
            index += 1
        self.isa = isa or next(iter(self.isas))
        if self.isa not in self.isas:
            raise BackendError(
                f"{ISA_VARIABLE} must be one of {', '.join(self.isas)} on this processor, or 'none' for plain torch; "
                f"got {self.isa!r}"
            )
        index, c = self.isas[self.isa], self._c
        functions = (c.hf_sparse_linear, c.hf_sparse_ffn, c.hf_sparse_attention)
        self.fp32 = NativeOps([partial(function, index) for function in functions], fp32_structure)
        self.int8: NativeOps | None = None
        if c.hf_sparse_has_int8(index):
            self.int8 = NativeOps([partial(function, index) for function in self._declare_int8()], int8_structure)
        self._dense = partial(c.hf_sparse_dense, index)
        self._rms_norm = partial(c.hf_sparse_rms_norm, index)

    def _declare(self) -> None:
        # A name that is missing means that the library is of another version of the sources.
        self._c.hf_sparse_isa.restype = ctypes.c_char_p
        self._c.hf_sparse_shares.argtypes = []
        self._c.hf_sparse_has_int8.argtypes = [ctypes.c_int]
        functions = (self._c.hf_sparse_linear, self._c.hf_sparse_ffn, self._c.hf_sparse_attention)
        for function, types in zip(functions, argument_types(CWeight), strict=True):
            function.argtypes = [ctypes.c_int, *types]
        self._c.hf_sparse_dense.argtypes = [
            ctypes.c_int,
            *[ctypes.c_void_p] * 4,
            *[ctypes.c_int64] * 3,
            ctypes.c_int32,
        ]
        self._c.hf_sparse_rms_norm.argtypes = [
            ctypes.c_int,
            *[ctypes.c_void_p] * 3,
            *[ctypes.c_int64] * 2,
            *[ctypes.c_float] * 2,
        ]

    def _declare_int8(self) -> tuple[Callable[..., int], ...]:
        functions = (self._c.hf_sparse_int8_linear, self._c.hf_sparse_int8_ffn, self._c.hf_sparse_int8_attention)
        for function, types in zip(functions, argument_types(CInt8Weight), strict=True):
            function.argtypes = [ctypes.c_int, *types]
        return functions

    def bound(self, name: str, types: Sequence[Any]) -> Callable[..., int]:
        """Return a C function whose first argument, the instruction set, is given.

        Args:
            types: of the other arguments.

        Raises:
            BackendError: there is no such function: the library was built from other sources.
        """
        try:
            function = self._c[name]
        except AttributeError as error:
            raise BackendError(
                f"the C++ kernels at {self.path} have no {name} ({error}); rebuild them: {_BUILD}"
            ) from error
        function.argtypes = [ctypes.c_int, *types]
        return partial(function, self.isas[self.isa])

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute a dense linear layer of a few tokens; weight and bias contiguous."""
        x = readable(x)
        out, width = weight.shape
        y = x.new_empty((*x.shape[:-1], out))
        result = self._dense(
            *(weight.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr()),
            *(y.data_ptr(), x.shape[:-1].numel(), width, out, torch.get_num_threads()),
        )
        return checked(result, y)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        """Compute the RMSNorm of each row; `offset` is added to the weight."""
        x, weight = readable(x), weight.contiguous()
        y = torch.empty_like(x)
        result = self._rms_norm(
            *(x.data_ptr(), weight.data_ptr(), y.data_ptr()),
            *(x.shape[:-1].numel(), len(weight), eps, offset),
        )
        return checked(result, y)


def library_status() -> LibraryStatus:
    """Return whether the C++ kernels are available, and where; or why not, and how to build them."""
    library, why = _load()
    if library is None:
        return LibraryStatus(False, None, None, f"{why}; sparse matmuls run in plain torch, slower")
    threads = "" if library.parallel else ", on one thread: they were built without OpenMP"
    return LibraryStatus(
        True, library.path, library.isa, f"C++ kernels at {library.path}, using {library.isa}{threads}"
    )


def why_not_built() -> str | None:
    """Return why there are no C++ kernels; None if there are."""
    status = library_status()
    return None if status.available else status.message


def library() -> Library | None:
    """Return the library, or None where there is none."""
    return _load()[0]


@cache
def _load() -> tuple[Library | None, str]:
    isa = os.environ.get(ISA_VARIABLE)
    if isa == "none":
        return None, f"the C++ kernels are switched off by {ISA_VARIABLE}=none"
    if not TARGET.exists():
        log = LOG.read_text(encoding="utf-8").strip() if LOG.exists() else ""
        reason = f" (at install: {log})" if log else ""
        return None, f"the C++ kernels are not built{reason}; build them with {_BUILD}"
    try:
        return Library(str(TARGET), isa), ""
    except BackendError as error:
        if isa:
            logger.warning("%s. Until then sparse matmuls run in plain torch, slower", error)
        return None, str(error)


def readable(x: Tensor) -> Tensor:
    """Return an input as the kernels read it: another type would be read, and written, past its end."""
    if x.dtype != torch.float32 or not x.is_cpu:
        raise BackendError(f"the C++ kernels take float32 on the CPU, got {x.dtype} on {x.device}")
    return x.contiguous()


def _tail(x: Tensor, activation: str) -> tuple[int, int, int]:
    return x.shape[:-1].numel(), ACTIVATIONS.index(activation), torch.get_num_threads()


_REASONS = {
    1: "pointers or columns of a weight lead outside of it: pack the weight again",
    2: "not enough memory for a tile",
    3: "arguments that do not fit together",
}


def checked(result: int, y: Tensor) -> Tensor:
    """Return the output of a kernel, or raise `BackendError` with what its result says."""
    if result:
        raise BackendError(f"a C++ kernel failed: {_REASONS.get(result, result)}")
    return y
