"""Weights that an operator was called with before, as C++ takes them.

To check the weights of an operator, and to describe them to C++, takes longer than to multiply a sentence by them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .c_structures import Described, with_bias
from .validation import check_bias

_Tensors = Sequence[Tensor | None]
_Identity = tuple[list[int], list[int]]


def _identity(tensors: _Tensors) -> _Identity:
    """Return the ids of tensors, and their addresses in memory."""
    return [*map(id, tensors)], [0 if each is None else each.data_ptr() for each in tensors]


def _differs(bias: Tensor, reference: weakref.ref[Tensor] | None, address: int) -> bool:
    return reference is None or reference() is not bias or bias.data_ptr() != address


@dataclass(frozen=True)
class _Known:
    """Weights and a norm that were checked.

    Attributes:
        tensors: which they are.
        biases: those that were described, and their addresses.
        constants: the other arguments of the call.
        described: all of them.
        references: forget this as soon as one of `tensors` dies, so that an id is never that of another one.
    """

    tensors: _Identity
    biases: tuple[tuple[weakref.ref[Tensor] | None, int], ...]
    constants: tuple[Any, ...]
    described: Described
    references: tuple[weakref.ref[Tensor], ...]


class KnownWeights:
    """The weights of the calls of one operator.

    They are known by their very tensors: those that were replaced, or lie elsewhere in memory (`tensor.data = ...`),
    are checked and described anew. What tensors hold is read at each call.

    Args:
        tensors: places of the tensors of weights and norm among the arguments, two at least, without biases.
        biases: places of the biases, in the order of the weights.
        constants: returns what else the weights were checked with.
    """

    def __init__(
        self,
        tensors: Sequence[int],
        biases: Sequence[int],
        constants: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    ) -> None:
        self._tensors, self._biases, self._constants = itemgetter(*tensors), tuple(biases), constants
        self._known: dict[int, _Known] = {}

    def find(self, arguments: tuple[Any, ...]) -> Described | None:
        """Return the weights of a call for C++, if they are known.

        Raises:
            BackendError: a bias has another shape or type.
        """
        known = self._known.get(id(arguments[0]))
        if known is None or known.constants != self._constants(arguments):
            return None
        if known.tensors != _identity(self._tensors(arguments)):
            return None
        biases = [arguments[place] for place in self._biases]
        # Layers that are computed together have a new one at each call, see `runtime.joint`.
        for (reference, address), bias in zip(known.biases, biases, strict=True):
            if (bias is None and reference is not None) or (bias is not None and _differs(bias, reference, address)):
                return _with_biases(known.described, biases)
        return known.described

    def add(self, arguments: tuple[Any, ...], described: Described) -> None:
        """Remember the weights of a call, which were checked."""
        tensors: _Tensors = self._tensors(arguments)
        biases: _Tensors = [arguments[place] for place in self._biases]
        present = [each for each in (*tensors, *biases) if each is not None]
        # Of others, copies were described, which are gone after the call.
        if not all(each.is_contiguous() for each in present) or any(
            bias is not None and bias.dtype != torch.float32 for bias in biases
        ):
            return
        key, known = id(arguments[0]), self._known

        def forget(_: object) -> None:
            known.pop(key, None)

        known[key] = _Known(
            _identity(tensors),
            tuple((None, 0) if bias is None else (weakref.ref(bias), bias.data_ptr()) for bias in biases),
            self._constants(arguments),
            described._replace(kept=()),
            tuple(weakref.ref(each, forget) for each in tensors if each is not None),
        )


def _with_biases(described: Described, biases: _Tensors) -> Described | None:
    """Return the same weights with other biases; None if they are on another device."""
    for bias, out in zip(biases, described.out_features, strict=True):
        check_bias(bias, out)
        if bias is not None and not bias.is_cpu:
            return None
    made = [with_bias(each, bias) for each, bias in zip(described.structures, biases, strict=True)]
    return described._replace(structures=tuple(each for each, _ in made), kept=tuple(bias for _, bias in made))
