"""What a layer form is: another way to hold the matrix of a layer, and how a saved model is built with it.

A form that replaces the matrix is a module of its own; one that adds to it is a child of the layer. Which layers have
which form is a fact of the model, found by looking at its modules, and written into the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ..integration import integration_of
from ..layer_kinds import is_linear, matrix_shape


@dataclass(frozen=True)
class Form:
    """One form.

    Args:
        name: in files.
        facts: names of the integers that a file has of a layer, beside `rows` and `columns`.
        read: returns these integers of a module, with `rows` and `columns`; None if it is not of this form.
        build: puts an empty layer of this form in the place of a plain one, and returns it; raises `CheckpointError`
            for facts that cannot be.
        parts: names of the parameters that replace the weight; none = the weight stays.
        beside: names of the parameters that are stored next to the weight.
    """

    name: str
    facts: tuple[str, ...]
    read: Callable[[nn.Module], dict[str, int] | None]
    build: Callable[[nn.Module, Mapping[str, int]], nn.Module]
    parts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def values(self, layer: nn.Module) -> list[nn.Parameter]:
        """Return what a layer holds, without its bias and the weight beside it."""
        return [layer.get_parameter(name) for name in (*self.parts, *self.beside)]


FORMS: dict[str, Form] = {}


def register_form(form: Form) -> None:
    """Let layers of a form be saved and loaded."""
    FORMS[form.name] = form


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, under every name that the other has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = layer
    layer.train(old.training)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer of a form in the place of a plain one. Layers that share its weight share its parts from then on.

    Args:
        name: of the plain layer.
        layer: of a form that stands in the place of the weight.
    """
    old = model.get_submodule(name)
    weight, form = old._parameters["weight"], form_of(layer)
    assert form is not None
    facts = form.read(layer)
    assert facts is not None
    put_layer(model, name, layer)
    tied = [path for path, other in model.named_modules() if other._parameters.get("weight") is weight]
    for path in tied:
        twin = form.build(model.get_submodule(path), facts)
        for part in form.parts:
            setattr(twin, part, getattr(layer, part))
        put_layer(model, path, twin)
    integration_of(model).retie(model)


def form_of(module: nn.Module) -> Form | None:
    """Return the form of a layer that has no weight of its own any more; None = it has one."""
    return next((form for form in FORMS.values() if form.parts and form.read(module) is not None), None)


def size_of(layer: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer, or entries and features of an embedding."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    assert is_linear(layer)
    return matrix_shape(layer)
