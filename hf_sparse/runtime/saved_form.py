"""What a file in runtime form says of a model: which layers are packed how, for which kernels, on what processor.

It is written next to the tensors, and is untrusted like them: `from_dict` accepts exactly what `to_dict` writes.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, get_args

from ..errors import CheckpointError
from ..formats.manifest import is_count
from ..kernels import KERNELS, library_status
from ..utils.text import shorten
from .candidates import JOINT, Form
from .packed_weight import EXACT

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what stands there."""

REMEDY = "load the checkpoint that it was made of, and call hf_sparse.to_runtime and hf_sparse.save_runtime here"

_NAME = re.compile(r"[\w.-]{1,500}", re.ASCII)
_MOST = 2**16
"""More rows, or layers of one sub-block, are a mistake or an attack."""


@dataclasses.dataclass(frozen=True)
class SavedUnit:
    """Layers that are packed together.

    Args:
        form: as of `PackCandidate`.
        kernel: its name.
        layers: their names. Those of `JOINT` forms have one packed weight, under the name of the first.
        rows: block height of each packed weight.
        exact_rows: that of the exact weight beside the operands of a kernel that rounds; else 0.
        dense_up_to: token count up to which they compute with their dense weights, which are then stored too.
    """

    form: Form
    kernel: str
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    exact_rows: tuple[int, ...]
    dense_up_to: int = 0

    def __post_init__(self) -> None:
        _require(self.form in get_args(Form), f"the form of a packed unit must be one of {get_args(Form)}", self.form)
        _require(_is_name(self.kernel), "the kernel of a packed unit must be a name", self.kernel)
        wanted = {"linear": (1, 1), "ffn": (2, 3), "qkv": (2, _MOST), "gate_up": (2, 2)}[self.form]
        names = self.layers
        good = isinstance(names, tuple) and wanted[0] <= len(names) <= wanted[1] and all(map(_is_name, names))
        _require(good, f"a packed unit '{self.form}' has the names of {wanted[0]} layers or more", names)
        for heights in (self.rows, self.exact_rows):
            count = 1 if self.form in JOINT else len(names)
            good = isinstance(heights, tuple) and len(heights) == count and all(map(is_count, heights))
            _require(good and max(heights) <= _MOST, f"a packed unit has {count} block heights", heights)
        good = is_count(self.dense_up_to) and self.dense_up_to <= _MOST
        _require(good, "`dense_up_to` of a packed unit must be a token count", self.dense_up_to)

    @property
    def owners(self) -> tuple[str, ...]:
        """The layers under whose names packed weights are stored."""
        return self.layers[:1] if self.form in JOINT else self.layers


@dataclasses.dataclass(frozen=True)
class SavedRuntime:
    """A model in runtime form.

    Args:
        model: name of its class.
        isa: instruction set of the kernels where it was made, "none" without them.
        layouts: version of the layout of each kernel that is used.
        units: all that is packed.
        lm_head: name of the LM head, if the GEMV kernel reads it; else "".
        copy: kernel for which a copy of it is packed; "" = the kernel reads the weight.
        shared: names of parameters that are another one -> the name of that.
        targets: weights that are meant to be sparse -> how many of their entries are not zero.
        version: of this description.

    Example:
        >>> unit = SavedUnit("linear", "cpu", ("layer",), (4,), (0,))
        >>> saved = SavedRuntime("BertModel", "avx2", {"cpu": 1}, (unit,))
        >>> SavedRuntime.from_dict(saved.to_dict()) == saved
        True
    """

    model: str
    isa: str
    layouts: Mapping[str, int]
    units: tuple[SavedUnit, ...]
    lm_head: str = ""
    copy: str = ""
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, int] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        for text in (self.model, self.isa):
            _require(_is_name(text), "class and instruction set of a runtime form must be names", text)
        for text in (self.lm_head, self.copy):
            _require(text == "" or _is_name(text), "the LM head of a runtime form must be a name", text)
        for key, kind in (("layouts", is_count), ("targets", is_count), ("shared", _is_name)):
            found = getattr(self, key)
            good = isinstance(found, Mapping) and all(_is_name(name) and kind(value) for name, value in found.items())
            _require(good, f"`{key}` of a runtime form must be a mapping from names", found)
        layers = [layer for unit in self.units for layer in unit.layers]
        _require(bool(layers) and len(layers) == len(set(layers)), "a runtime form packs each layer once", layers)
        used = {unit.kernel for unit in self.units} | ({self.copy} - {""})
        _require(used <= set(self.layouts), f"`layouts` of a runtime form must have {sorted(used)}", self.layouts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        out = dataclasses.asdict(self)
        return out | {
            "units": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in unit.items()}
                for unit in out["units"]
            ]
        }

    @classmethod
    def from_dict(cls, data: Any) -> SavedRuntime:
        """Build from plain JSON types.

        Raises:
            CheckpointError: for anything that `to_dict` would not have written.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if version != VERSION:
            raise CheckpointError(
                f"the runtime form is of version {shorten(version)}, and this hf_sparse reads {VERSION}: {REMEDY}"
            )
        data = _fields(cls, data)
        units = data["units"]
        _require(isinstance(units, list), "`units` of a runtime form must be a list", units)
        return cls(**{**data, "units": tuple(SavedUnit(**_tuples(_fields(SavedUnit, unit))) for unit in units)})

    def check_here(self) -> None:
        """Refuse a file whose tensors this machine, or this version, would read as something else.

        Raises:
            CheckpointError: naming the kernel, and what to do.
        """
        here = isa_here()
        if sys.byteorder != "little":
            raise CheckpointError(f"the file is in runtime form, for little-endian processors: {REMEDY}")
        needed = {*self.layouts} | ({EXACT} if any(max(unit.exact_rows) for unit in self.units) else set())
        for name in sorted(needed):
            self._check_kernel(name, here)
        if here != self.isa:
            logger.warning(
                f"the runtime form was made with kernels for {self.isa}, and this processor has {here}. Outputs are "
                "right, but which layers are packed was decided for another processor, and may be slower than it could "
                f"be. To decide again, {REMEDY}"
            )

    def _check_kernel(self, name: str, here: str) -> None:
        if name not in KERNELS:
            raise CheckpointError(
                f"the file is packed for the kernel {shorten(name)}, which this hf_sparse has not: {REMEDY}"
            )
        kernel = KERNELS[name]
        if self.layouts.get(name) != kernel.layout.version:
            raise CheckpointError(
                f"the file is packed in version {self.layouts.get(name)} of the layout of the kernel '{name}', and "
                f"this hf_sparse has version {kernel.layout.version}: {REMEDY}"
            )
        if kernel.layout.by_isa and here != self.isa:
            raise CheckpointError(
                f"the file is packed for the kernel '{name}' on {self.isa}, and this processor has {here}, where its "
                f"layout is another: {REMEDY}"
            )
        if (why := kernel.unavailable()) is not None:
            raise CheckpointError(
                f"the file is packed for the kernel '{name}', which cannot run here: {why}. To run the model here, "
                f"{REMEDY}"
            )


def isa_here() -> str:
    """Return the instruction set of the kernels on this machine; "none" without them."""
    return library_status().isa or "none"


def _fields(cls: type, data: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    _require(isinstance(data, Mapping) and set(data) == names, f"{cls.__name__} has the keys {sorted(names)}", data)
    return dict(data)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _require(good: bool, what: str, found: object) -> None:
    if not good:
        raise CheckpointError(f"{what}, got {shorten(found)}")
