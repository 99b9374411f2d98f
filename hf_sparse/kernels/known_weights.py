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


def _seen(tensors: _Tensors) -> list[Any]:
    """Return what the checks and C++ know of tensors: where they lie, and as what they are read."""
    return [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.is_contiguous(), t.is_cpu) for t in tensors]


@dataclass(frozen=True)
class Seen:
    """The arguments of a call, as far as its checks depend on them.

    Attributes:
        tensors: of weights and norm.
        biases: of the weights.
        constants: the other arguments.
    """

    tensors: list[Any]
    biases: list[Any]
    constants: tuple[Any, ...]


class KnownWeights:
    """The weights that one operator was called with, by their first tensor, for as long as that lives.

    A call finds them again if its tensors lie at the same places in memory, in the same types and shapes; others are
    checked and described anew. What the tensors hold is read at each call.

    Args:
        tensors: places of the tensors of weights and norm among the arguments, without biases: the first argument, and
            one more at least.
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
        self._known: dict[int, tuple[Seen, Described, weakref.ref[Tensor]]] = {}

    def find(self, arguments: tuple[Any, ...]) -> Described | None:
        """Return the weights of a call for C++, if they are known.

        Raises:
            BackendError: a bias is another than before, and has a wrong shape or type.
        """
        known = self._known.get(id(arguments[0]))
        if known is None:
            return None
        seen, described, _ = known
        if seen.constants != self._constants(arguments) or seen.tensors != _seen(self._tensors(arguments)):
            return None
        biases = [arguments[place] for place in self._biases]
        # Layers that are computed together have a new one at each call, see `runtime.joint`.
        return described if seen.biases == _seen(biases) else _with_biases(described, biases)

    def see(self, arguments: tuple[Any, ...]) -> Seen:
        """Return what `add` takes: before a call is checked, so that a change meanwhile is noticed."""
        biases = [arguments[place] for place in self._biases]
        return Seen(_seen(self._tensors(arguments)), _seen(biases), self._constants(arguments))

    def add(self, arguments: tuple[Any, ...], seen: Seen, described: Described) -> None:
        """Remember the weights of a call, which were checked and described after `see`."""
        biases = [arguments[place] for place in self._biases]
        copied = [
            each for each in (*self._tensors(arguments), *biases) if each is not None and not each.is_contiguous()
        ]
        copied += [bias for bias in biases if bias is not None and bias.dtype != torch.float32]
        if copied or seen != self.see(arguments):
            return  # the copies that were described are gone after the call
        key, known = id(arguments[0]), self._known

        def forget(_: object) -> None:
            known.pop(key, None)

        known[key] = seen, described._replace(kept=()), weakref.ref(arguments[0], forget)


def _with_biases(described: Described, biases: _Tensors) -> Described | None:
    """Return the same weights with other biases; None if they are on another device."""
    for bias, out in zip(biases, described.out_features, strict=True):
        check_bias(bias, out)
        if bias is not None and not bias.is_cpu:
            return None
    made = [with_bias(each, bias) for each, bias in zip(described.structures, biases, strict=True)]
    return described._replace(structures=tuple(each for each, _ in made), kept=tuple(bias for _, bias in made))
