"""What a layer kind says, and where to look up that of a module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .view import MatrixView

MatrixLayer: TypeAlias = nn.Linear
"""Static type of a layer of any kind. Only `weight` and `bias` are common to all: sizes come from `matrix_shape`."""

KeptTokens: TypeAlias = Callable[[Tensor], Tensor | None]
"""Takes the input of a layer, returns which of its tokens are not padding; None = all."""


class LayerKind:
    """What is to be known of a class of modules to prune their weights.

    Attributes:
        is_linear: whether a layer multiplies by the matrix and nothing else, and is among the default targets.
        title: of the kind, for messages; "" = the name of the class.
    """

    is_linear: bool = False
    title: str = ""

    def matches(self, module: nn.Module) -> bool:
        """Return whether a module of no registered class is of this kind."""
        return False

    def attributes(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights of a module."""
        return ("weight",)

    def shape(self, module: nn.Module, attribute: str) -> tuple[int, ...]:
        """Return the shape of a weight as it is stored; also where the values are packed (bitsandbytes)."""
        held = Slot(module, attribute).parameter  # not the masked weight, which would be computed
        return tuple((getattr(module, attribute) if held is None else held).shape)

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """Return a weight as a matrix."""
        raise NotImplementedError

    def resize(self, module: nn.Module, outputs: int, inputs: int) -> None:
        """Let a module state how many outputs and inputs its weight has now."""
        raise NotImplementedError

    def not_observable(self, module: nn.Module) -> str | None:
        """Return why the inputs of a layer cannot be distinguished from those of its module; None = they can."""
        return None

    def input_rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return the inputs of a layer with those that one row of the matrix is multiplied with in the last dimension.

        Args:
            inputs: what the module was called with.
        """
        return inputs

    def parts(self, module: nn.Module, attribute: str) -> int | None:
        """Return how many matrices a weight stacks in its first dimension, each with inputs of its own.

        None = it is one matrix, with the inputs of the module.
        """
        return None

    def part_view(self, module: nn.Module, attribute: str) -> MatrixView:
        """Return one matrix of a stack, which is stored as `weight[part]`."""
        raise NotImplementedError

    def part_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: Collection[int],
        kept: KeptTokens,
    ) -> Iterator[tuple[str, int, Tensor]]:  # fmt: skip
        """Yield attribute, part and inputs `(tokens, in)` of the matrices of a stack that have any in one call.

        Args:
            args, kwargs: of the call.
            parts: that matter.
            kept: which tokens count.
        """
        raise NotImplementedError


_KINDS: dict[type[nn.Module], LayerKind] = {}
_MATCHED: list[LayerKind] = []


def register_layer_kind(kind: LayerKind, *classes: type[nn.Module]) -> None:
    """Let the layers of some classes, and of those derived from them, be matched and pruned.

    Args:
        kind: what is known of them.
        classes: none = every module that the kind `matches`.
    """
    _KINDS.update(dict.fromkeys(classes, kind))
    if not classes:
        _MATCHED.append(kind)


def known_kinds() -> str:
    """Return the names of all classes, for a message.

    Example:
        >>> "nn.Linear" in known_kinds()
        True
    """
    names = [("nn." if cls.__module__.startswith("torch.nn") else "") + cls.__name__ for cls in _KINDS]
    names += [kind.title for kind in _MATCHED]
    return ", ".join(names[:-1]) + f" and {names[-1]}"


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module, or None."""
    found = next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), None)
    return found or next((kind for kind in _MATCHED if kind.matches(module)), None)


def _kind(module: nn.Module) -> LayerKind:
    kind = kind_of(module)
    if kind is None:  # an embedding: a matrix with a row for each token
        return _KINDS[nn.Linear]
    return kind


class Slot(NamedTuple):
    """Where a weight of a model is: a module, and the attribute that holds it.

    Example:
        >>> slot = Slot(nn.Conv2d(3, 2, 1))
        >>> slot.view.matrix_shape, slot.name("features.0"), Slot(nn.Linear(1, 1), "bias").name("head")
        ((2, 3), 'features.0.weight', 'head.bias')
    """

    module: Any
    attribute: str = "weight"

    @property
    def tensor(self) -> Tensor:
        """The weight; under a mask, the masked one."""
        found: Tensor = getattr(self.module, self.attribute)
        return found

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that an optimizer trains: the weight, or what a parametrization computes it from."""
        held: nn.Parameter | None = self.module._parameters.get(self.attribute)
        if held is None and parametrize.is_parametrized(self.module, self.attribute):
            held = getattr(self.module.parametrizations[self.attribute], "original", None)
        return held

    @property
    def view(self) -> MatrixView:
        """The weight as a matrix."""
        return _kind(self.module).view(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is stored."""
        return _kind(self.module).shape(self.module, self.attribute)

    @property
    def parts(self) -> int | None:
        """How many matrices it stacks, each with inputs of its own; None = it is one."""
        return _kind(self.module).parts(self.module, self.attribute)

    @property
    def part_view(self) -> MatrixView:
        """One matrix of a stack."""
        return _kind(self.module).part_view(self.module, self.attribute)

    def name(self, path: str) -> str:
        """Return the full name of the weight in a model.

        Args:
            path: of the module.
        """
        return f"{path}.{self.attribute}" if path else self.attribute

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Slot:
        """Return the place of a weight by its full name."""
        path, _, attribute = name.rpartition(".")
        return cls(model.get_submodule(path), attribute)


def slots_of(module: nn.Module) -> tuple[Slot, ...]:
    """Return the weights of a module that can be pruned.

    Example:
        >>> len(slots_of(nn.Conv1d(2, 2, 3))), slots_of(nn.LayerNorm(2))
        (1, ())
    """
    kind = kind_of(module)
    return () if kind is None else tuple(Slot(module, attribute) for attribute in kind.attributes(module))


def is_matrix_layer(module: object) -> TypeGuard[MatrixLayer]:
    """Return whether a module is a layer with one weight that can be pruned.

    Example:
        >>> is_matrix_layer(nn.Linear(2, 3)), is_matrix_layer(nn.LayerNorm(2))
        (True, False)
    """
    return isinstance(module, nn.Module) and [slot.attribute for slot in slots_of(module)] == ["weight"]


def is_linear(layer: object) -> TypeGuard[MatrixLayer]:
    """Return whether a layer does nothing but multiply by its matrix and add its bias.

    Example:
        >>> is_linear(nn.Linear(2, 3)), is_linear(nn.Conv1d(2, 3, 1))
        (True, False)
    """
    kind = kind_of(layer) if isinstance(layer, nn.Module) else None
    return kind is not None and kind.is_linear


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer stores its weight as the matrix `(out, in)`."""
    return _kind(layer).view(layer, "weight").is_plain


def stored_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of the weight as the layer stores it; also where the values are packed (bitsandbytes)."""
    return Slot(layer).shape


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a layer.

    Example:
        >>> matrix_shape(nn.Linear(2, 3)), matrix_shape(nn.Conv2d(2, 3, 5))
        ((3, 2), (3, 50))
    """
    return Slot(layer).view.matrix_shape


def oriented(layer: nn.Module, values: Tensor) -> Tensor:
    """Return a tensor of the shape of a weight as a matrix `(out, in)`."""
    return Slot(layer).view.to_matrix(values)


def output_axis(layer: nn.Module) -> int:
    """Return the dimension of the stored weight that has the outputs."""
    return Slot(layer).view.order[0]


def set_matrix_shape(layer: nn.Module, outputs: int, inputs: int) -> None:
    """Let a layer state the outputs and inputs (of a convolution: channels) that its weight has now."""
    _kind(layer).resize(layer, outputs, inputs)
