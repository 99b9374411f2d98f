"""The C++ functions of weights in bits, called with structures that are kept.

A model that generates calls them token by token, and to check a weight and to describe it to C++ would take longer than
to multiply by a small one.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .library import Library, checked
from .validation import check_bias

_address = Tensor.data_ptr


@dataclass(frozen=True)
class _Known:
    """A weight that was checked, as the C function takes it, without its bias.

    Attributes:
        ids, addresses: of its tensors.
        sizes: out_features and in_features.
        structure: the C structure; `at` is its address.
        function: of the library `loaded`.
        references: forget this as soon as a tensor dies, so that an id is never that of another one.
    """

    ids: list[int]
    addresses: list[int]
    sizes: tuple[int, int]
    structure: ctypes.Structure
    at: int
    function: Callable[..., int]
    loaded: Library
    references: tuple[weakref.ref[Tensor], ...]


class NativeBits:
    """One C function of a format of weights in bits.

    A weight is known by its very tensors: those that were replaced, or lie elsewhere in memory (`tensor.data = ...`),
    are checked and described anew. What they hold is read at each call.

    Args:
        name: of the function.
        structure: its weight: addresses of the tensors and of the bias, the number of values, out and in features, and
            what `facts` adds.
        library: returns the library to call.
        facts: values -> further fields of the structure.
    """

    def __init__(
        self,
        name: str,
        structure: type[ctypes.Structure],
        library: Callable[[], Library | None],
        facts: Callable[[Tensor], Sequence[int]] = lambda values: (),
    ) -> None:
        self.name, self.structure, self.library, self.facts = name, structure, library, facts
        names = [field[0] for field in structure._fields_]
        self.count = names.index("bias")  # of the tensors of a weight
        self.known: dict[int, _Known] = {}

    def of_known(self, x: Tensor, arguments: tuple[Any, ...]) -> Tensor | None:
        """Compute with a weight that was checked before; None = it was not, or the input has to be looked at.

        Args:
            arguments: of the operator, after the input: a weight with its bias.
        """
        known = self.known.get(id(arguments[0]))
        if known is None:
            return None
        parts, shape = arguments[: self.count], x.shape
        same = known.ids == [*map(id, parts)] and known.addresses == [*map(_address, parts)]
        if not same or known.sizes != arguments[self.count + 1 :] or known.loaded is not self.library():
            return None
        if x.dtype != torch.float32 or not x.is_cpu or not shape or shape[-1] != known.sizes[1]:
            return None
        return self._call(known, x, arguments[self.count])

    def __call__(self, x: Tensor, weight: tuple[Any, ...]) -> Tensor | None:
        """Compute with a weight that fits together; None = no C++ function reads it.

        Raises:
            BackendError: with what the result of the function says.
        """
        loaded, parts = self.library(), weight[: self.count]
        on_cpu = all(part is None or part.is_cpu for part in (x, *weight[: self.count + 1]))
        if loaded is None or not on_cpu or x.dtype != torch.float32:
            return None
        made = [part.contiguous() for part in parts]
        known = self._describe(made, weight[self.count + 1 :], loaded)
        if all(one is other for one, other in zip(made, parts, strict=True)):
            self.known[id(parts[0])] = known
        return self._call(known, x, weight[self.count])

    def _describe(self, parts: Sequence[Tensor], sizes: tuple[int, int], loaded: Library) -> _Known:
        key, known, addresses = id(parts[0]), self.known, [*map(_address, parts)]

        def forget(_: object) -> None:
            known.pop(key, None)

        structure = self.structure(*addresses, None, parts[0].numel(), *sizes, *self.facts(parts[0]))
        types = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int32]
        return _Known(
            *([*map(id, parts)], addresses, sizes, structure, ctypes.addressof(structure)),
            *(loaded.bound(self.name, types), loaded, tuple(weakref.ref(part, forget) for part in parts)),
        )

    def _call(self, known: _Known, x: Tensor, bias: Tensor | None) -> Tensor | None:
        out, width = known.sizes
        at = known.at
        if bias is not None:
            check_bias(bias, out)
            if not bias.is_cpu:
                return None
            bias = bias.to(torch.float32).contiguous()
            structure: Any = self.structure.from_buffer_copy(known.structure)  # other threads read that of the weight
            structure.bias, at = bias.data_ptr(), ctypes.addressof(structure)
        x = x.contiguous()
        shape = x.shape[:-1]
        y = x.new_empty((*shape, out))
        tokens = x.numel() // width if width else shape.numel()
        result = known.function(at, x.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads())
        return checked(result, y) if result else y
