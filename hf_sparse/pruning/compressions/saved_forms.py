"""From the layers of a model to what a file says of their forms, and back."""

from __future__ import annotations

from torch import nn

from ...errors import CheckpointError
from ...formats.layer_forms import LayerForm, LayerForms
from ...modeling.forms import FORMS, put_layer, size_of
from ...modeling.integration import integration_of
from ...modeling.layer_kinds import is_linear
from ...utils.text import shorten


def forms_of(model: nn.Module) -> LayerForms:
    """Return the layers of a model that have a form.

    Example:
        >>> forms_of(nn.Linear(2, 2)).to_dict()
        {}
    """
    found = {}
    for name, module in model.named_modules():
        for form in FORMS.values():
            if (facts := form.read(module)) is not None:
                found[name] = LayerForm(form.name, facts)
    return LayerForms(found)


def apply_forms(model: nn.Module, forms: LayerForms, prefix: str = "") -> None:
    """Give a model that was built from its config the layers of a checkpoint; for meta tensors.

    Args:
        prefix: what names in a model with a head have in front, and those in a base model do not.

    Raises:
        CheckpointError: if the forms do not fit the model.
    """
    modules = dict(model.named_modules())
    for name, stated in forms.layers.items():
        names = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]
        place = next((each for each in names if each in modules), None)
        if place is None:
            continue  # of a part that this model does not have
        form, layer = FORMS.get(stated.form), modules[place]
        if form is None:
            raise CheckpointError(
                f"'{name}' has the form {shorten(stated.form)}, which this version of hf_sparse does not know; is it "
                "from a newer one? pip install --upgrade hf-sparse"
            )
        wanted = {"rows", "columns", *form.facts}
        if set(stated.facts) != wanted:
            raise CheckpointError(f"the form of '{name}' must have exactly {', '.join(sorted(wanted))}")
        if not (is_linear(layer) or isinstance(layer, nn.Embedding)):
            raise CheckpointError(f"'{name}' has the form '{form.name}', but it is a {type(layer).__name__} here")
        size = (stated.facts["rows"], stated.facts["columns"])
        if size != size_of(layer):
            raise CheckpointError(
                f"'{name}' is {size[0]} x {size[1]} in the checkpoint, and {size_of(layer)} according to config.json"
            )
        new = form.build(layer, stated.facts)
        if new is not layer:
            put_layer(model, place, new)
    integration_of(model).retie(model)
