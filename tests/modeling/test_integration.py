"""A library of models is looked up by the class of the model, and told what happens to it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from torch import nn
from transformers import BertModel

from hf_sparse import Pruner, SparsityConfig, SparsityError, sparsify
from hf_sparse.hf.quantization.integration import AnyModule, TransformersModel
from hf_sparse.modeling.integration import ModelIntegration, integration_of
from tests.helpers import tiny


class Recorded(nn.Sequential):
    """A model of a library that the test makes."""

    calls: ClassVar[list[Any]] = []


class Recording(ModelIntegration):
    def after_attach(self, model: nn.Module, config: Any) -> None:
        Recorded.calls.append(config)


integration_of.register(Recorded, lambda model: Recording())


def test_models_find_the_integration_of_their_library() -> None:
    assert type(integration_of(BertModel(tiny.config()))) is TransformersModel
    assert type(integration_of(nn.Linear(2, 2))) is AnyModule
    assert type(integration_of(Recorded())) is Recording


def test_integration_is_called_once_for_each_pruning_and_not_for_one_that_fails() -> None:
    config = SparsityConfig(targets="*", sparsity=0.5)
    model = Recorded(nn.Linear(4, 4))
    sparsify(model, config)
    Pruner(model, config).attach().bake()
    assert Recorded.calls == [config, config]
    nn.init.constant_(model[0].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match="NaN"):
        sparsify(model, config)
    assert Recorded.calls == [config, config]
