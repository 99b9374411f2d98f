"""Fact: which layers of a model hold something else than a dense matrix, so that it can be built with them.

Like the manifest this is untrusted input: `from_dict` accepts exactly what FORMAT.md describes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..utils.text import shorten
from .manifest import is_count

FORMS_KEY = "forms"
"""Key in `extra` of a manifest for the layers that hold something else than a dense matrix."""

_NAME = re.compile(r"[\w.-]{1,500}", re.ASCII)
_WORD = re.compile(r"[a-z_]{1,32}")
_LARGEST = 2**46


@dataclasses.dataclass(frozen=True)
class LayerForm:
    """One layer.

    Args:
        form: name of the form.
        facts: the integers that, with the layer that `config.json` describes, say what its tensors are.
    """

    form: str
    facts: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"form": self.form, **self.facts}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> LayerForm:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("form"), str) or not _WORD.fullmatch(data["form"]):
            raise CheckpointError(f"{where} must be a mapping with the name of a form as 'form', got {shorten(data)}")
        facts = {key: value for key, value in data.items() if key != "form"}
        for key, value in facts.items():
            if not isinstance(key, str) or not _WORD.fullmatch(key) or not is_count(value):
                raise CheckpointError(f"{where}: {shorten(key)} must be an integer from 0, got {shorten(value)}")
            if key != "seed" and value > _LARGEST:
                raise CheckpointError(f"{where}: {key} must be at most {_LARGEST}, got {value}")
        if len(facts) > 8:
            raise CheckpointError(f"{where} has {len(facts)} facts, and no form has more than 8")
        return cls(data["form"], facts)


@dataclasses.dataclass(frozen=True)
class LayerForms:
    """List the layers of a model that hold something else than a dense matrix. Falsy if there are none.

    Args:
        layers: by name of the layer.

    Example:
        >>> forms = LayerForms({"layer.0.query": LayerForm("low_rank", {"rows": 8, "columns": 8, "rank": 2})})
        >>> LayerForms.from_dict(forms.to_dict()) == forms
        True
    """

    layers: Mapping[str, LayerForm] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; nothing where there are none."""
        layers = {name: form.to_dict() for name, form in self.layers.items()}
        return {"layers": layers, "checksum": _checksum(layers)} if layers else {}

    @classmethod
    def from_dict(cls, data: Any) -> LayerForms:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        if (
            not isinstance(data, Mapping)
            or set(data) != {"layers", "checksum"}
            or not isinstance(data["layers"], Mapping)
        ):
            raise CheckpointError("forms must be a mapping with the keys 'layers' and 'checksum', and nothing else")
        layers = {}
        for name, form in data["layers"].items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise CheckpointError(f"forms: {shorten(name)} is not a name of a layer")
            layers[name] = LayerForm.from_dict(form, f"the form of '{name}'")
        if not layers or data["checksum"] != _checksum(data["layers"]):
            raise CheckpointError("the checksum of the forms does not match their content: the file is corrupted")
        return cls(layers)


def _checksum(layers: Mapping[str, Any]) -> str:
    """Return CRC-32 over the JSON of FORMAT.md: another seed is another weight, and no shape would tell."""
    text = json.dumps(layers, sort_keys=True, separators=(",", ":"))
    return f"crc32:{zlib.crc32(text.encode('ascii')):08x}"
