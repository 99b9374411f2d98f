"""Building a model with the forms of a file: facts that do not fit the model are refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hf_sparse import CheckpointError
from hf_sparse.formats.layer_forms import LayerForm, LayerForms
from hf_sparse.modeling.forms import HashedLinear
from hf_sparse.pruning.compressions.saved_forms import apply_forms, forms_of


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Embedding(5, 3))


def forms(name: str, form: str, **facts: int) -> LayerForms:
    return LayerForms({name: LayerForm(form, facts)})


HASHED: dict[str, int] = {"rows": 4, "columns": 6, "buckets": 3, "seed": 1}


def test_layers_get_their_form_and_parts_that_are_not_there_are_left_out() -> None:
    made = model()
    apply_forms(made, LayerForms({**forms("0", "hashed", **HASHED).layers, **forms("9.x", "hashed", **HASHED).layers}))
    assert isinstance(made[0], HashedLinear)
    assert forms_of(made) == forms("0", "hashed", **HASHED)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (forms("0", "folded", rows=4, columns=6), "does not know"),
        (forms("0", "hashed", rows=4, columns=6), "must have exactly"),
        (forms("0", "hashed", **{**HASHED, "rows": 6}), "according to config.json"),
        (forms("0", "hashed", **{**HASHED, "buckets": 25}), "cannot be"),
        (forms("0", "hashed", **{**HASHED, "buckets": 0}), "cannot be"),
        (forms("0", "low_rank", rows=4, columns=6, rank=5), "cannot have rank 5"),
        (forms("0", "sparse_low_rank", rows=4, columns=6, rank=0), "cannot have rank 0"),
        (forms("1", "hashed", **HASHED), "is a LayerNorm here"),
        (forms("2", "low_rank", rows=5, columns=3, rank=4), "Embedding of 5 x 3 cannot have rank 4"),
        (forms("2", "sparse_low_rank", rows=5, columns=3, rank=1), "Embedding"),
    ],
)
def test_what_does_not_fit_is_refused(stated: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        apply_forms(model(), stated)
