"""The table of operators: what it makes is part of exported programs, and stays."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import hf_sparse.kernels
from hf_sparse.errors import BackendError
from hf_sparse.kernels.csr_op import csr_linear, pack
from hf_sparse.kernels.op_table import WeightFormat
from hf_sparse.kernels.operators import without_rows

SCHEMAS = Path(__file__).parents[1] / "fixtures" / "operator_schemas.txt"


def test_schemas_are_those_of_exported_programs() -> None:
    assert hf_sparse.kernels.KERNELS
    own = {str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("hf_sparse::")}
    expected = set(SCHEMAS.read_text(encoding="utf-8").splitlines())
    assert {schema for schema in own if "::example_" not in schema} == expected


class Odd(NamedTuple):
    """A weight with an optional tensor, and without its number of inputs."""

    codes: Tensor
    table: Tensor | None
    bias: Tensor | None
    out_features: int

    @property
    def in_features(self) -> None:
        """Not stated."""


def test_schema_has_the_fields_of_the_weight() -> None:
    form = WeightFormat("odd", Odd, lambda x, weight: x)
    (spec,) = form.ops
    arguments = "Tensor x, Tensor codes, Tensor? table, Tensor? bias, SymInt out_features"
    assert spec.schema(form) == f"odd_linear({arguments}) -> Tensor"


def test_operator_without_rows_gets_all_other_arguments() -> None:
    got: list[object] = []

    def operator(x: Tensor, *arguments: object) -> Tensor:
        got.extend(arguments)
        return x

    x = torch.ones(1)
    assert without_rows(operator)(x, "values", "bias", 8, 3, 2) is x
    assert got == ["values", "bias", 3, 2]


def test_every_operator_refuses_an_input_of_another_width() -> None:
    parts = pack(torch.eye(3))
    with pytest.raises(BackendError, match=r"shape \(\.\.\., 3\)"):
        csr_linear(torch.ones(2, 4), *parts, None, 3, 3)
    with pytest.raises(BackendError, match="`bias` must be"):
        csr_linear(torch.ones(2, 3), *parts, torch.ones(2), 3, 3)
