"""Rows of a teacher cache: what is stored of the outputs for one example, and how it is checked."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from ...distillation.example_keys import Examples
from ...distillation.terms.base import EMBEDDING
from ...distillation.top_logits import TopLogits, top_logits
from ...errors import RecipeError, SparsityError

STORED = {"fp32": "float32", "fp16": "float16"}
LOGITS = ("logits", "start_logits", "end_logits", EMBEDDING)
_INDEX, _REST = "logits_index", "logits_rest"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the rows of a cache hold.

    Args:
        names: of the outputs.
        dtype: of their numbers, a key of `STORED`.
        top: how many tokens of each position have a logit; None = all.
        temperature: of the log-probabilities that are stored with `top`.
    """

    names: tuple[str, ...]
    dtype: str
    top: int | None = None
    temperature: float = 1.0

    @property
    def columns(self) -> dict[str, str]:
        """Type of each array by its name."""
        found = dict.fromkeys(self.names, STORED[self.dtype])
        return found if self.top is None else {**found, _INDEX: "int32", _REST: STORED[self.dtype]}

    @property
    def features(self) -> datasets.Features:
        """Columns of the file."""
        columns: dict[str, Any] = {"key": datasets.Value("string"), "checksum": datasets.Value("uint32")}
        for name, dtype in self.columns.items():
            columns[name] = datasets.Sequence(datasets.Value(dtype))
            columns[f"{name}_shape"] = datasets.Sequence(datasets.Value("int64"))
        return datasets.Features(columns)

    def split(self, outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the arrays that are stored of outputs.

        Raises:
            RecipeError: if only the most likely tokens were requested, and the model predicts no tokens.
        """
        found: dict[str, Tensor] = {name: outputs[name] for name in self.names}
        if self.top is None:
            return found
        if "logits" not in found or found["logits"].ndim < 3:
            raise RecipeError(
                f"`top` keeps the most likely tokens of each position, and the teacher returns {', '.join(found)} for "
                "whole examples: leave it out"
            )
        top = top_logits(found["logits"], self.top, self.temperature)
        return {**found, "logits": top.values, _INDEX: top.index, _REST: top.rest}

    def join(self, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return outputs of what was stored of them."""
        found: dict[str, Any] = {name: arrays[name] for name in self.names}
        if self.top is not None:
            found["logits"] = TopLogits(arrays["logits"], arrays[_INDEX], arrays[_REST])
        return found

    def rows(self, examples: Examples, outputs: Mapping[str, Any], seen: set[str]) -> Iterator[dict[str, Any]]:
        """Yield a row for each example of a batch that is not in `seen`, and add it there.

        Raises:
            SparsityError: if an output is not finite in this type.
        """
        arrays = self.split(outputs)
        masks = {name: examples.positions(name, tensor) for name, tensor in arrays.items()}
        for index, key in enumerate(examples.names()):
            if key in seen:
                continue
            seen.add(key)
            values, shapes = {}, {}
            for name, tensor in arrays.items():
                mask = masks[name]
                own = (tensor[index] if mask is None else tensor[index][mask[index]]).cpu()
                values[name], shapes[name] = self._stored(name, own).reshape(-1), list(own.shape)
            row: dict[str, Any] = {"key": key, "checksum": _checksum(key, values, shapes)}
            yield {**row, **values, **{f"{name}_shape": shape for name, shape in shapes.items()}}

    def _stored(self, name: str, values: Tensor) -> Any:
        dtype = self.columns[name]
        with np.errstate(over="ignore"):  # an error of its own, below
            stored = (values.float() if values.is_floating_point() else values).numpy().astype(dtype)
        if not np.isfinite(stored).all():
            raise SparsityError(
                f"the teacher's {name} are not finite as {self.dtype}; store them as fp32, or repair it"
            )
        return stored

    def read(self, row: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return the arrays of a row, or None if they are not what was written."""
        values = {name: np.asarray(row[name], dtype=dtype) for name, dtype in self.columns.items()}
        shapes = {name: [int(size) for size in row[f"{name}_shape"]] for name in values}
        fits = all(math.prod(shapes[name]) == value.size for name, value in values.items())
        if not fits or _checksum(row["key"], values, shapes) != int(row["checksum"]):
            return None
        return {
            name: torch.from_numpy(
                value.astype(np.float32 if value.dtype.kind == "f" else value.dtype, copy=True)
            ).view(shapes[name])
            for name, value in values.items()
        }


def size_of(row: Mapping[str, Any]) -> int:
    """Return the bytes of the arrays of a row."""
    return sum(int(value.nbytes) for value in row.values() if isinstance(value, np.ndarray))


def _checksum(key: str, values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return CRC-32 over the key, and name, shape and bytes of all arrays of an example."""
    digest = zlib.crc32(key.encode())
    for name, value in values.items():
        digest = zlib.crc32(f"{name}{list(shapes[name])}".encode(), digest)
        digest = zlib.crc32(np.ascontiguousarray(value).data, digest)
    return digest
