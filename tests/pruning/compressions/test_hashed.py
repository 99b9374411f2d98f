"""The hashed compression: fractions, seeds of layers, embeddings, and a recipe from training to a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel

from hf_sparse import RecipeError, SparsityConfig, sparsify
from hf_sparse.modeling.forms import HashedEmbedding, HashedLinear
from hf_sparse.pruning.compressions import Hashed
from tests.helpers.tiny import config


def test_ratio_may_be_a_fraction() -> None:
    assert Hashed(ratio="1/8").ratio == Hashed(ratio=0.125).ratio
    for wrong in ("1/0", "eighth", 0, 1, 2.0, True):
        with pytest.raises(RecipeError, match="`ratio`"):
            Hashed(ratio=wrong)
    written = SparsityConfig(compress={"name": "hashed", "ratio": "1/8"})
    assert SparsityConfig.from_dict(written.to_dict()) == written


def test_layers_of_one_shape_have_hashes_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify(model, {"targets": "*", "compress": {"name": "hashed", "ratio": 0.25, "start": "random"}})
    first, second = model
    assert isinstance(first, HashedLinear)
    assert isinstance(second, HashedLinear)
    assert first.buckets.numel() == 64
    assert first.seed != second.seed


def test_means_are_nearer_than_any_scale_of_them() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    weight = plain.weight.detach().clone()
    model: Any = sparsify(nn.Sequential(plain), {"targets": "*", "compress": {"name": "hashed", "ratio": "1/4"}})
    found = model[0].weight.detach()
    assert torch.equal(model[0].bias, plain.bias)
    error = float((found - weight).square().sum())
    assert error < float(weight.square().sum())
    assert error < min(float((found * scale - weight).square().sum()) for scale in (0.9, 1.1))


def test_embeddings_and_what_is_tied(tmp_path: Path) -> None:
    model = sparsify(BertModel(config()), {"targets": "*word_embeddings", "compress": {"name": "hashed", "ratio": 0.5}})
    table = model.embeddings.word_embeddings
    assert isinstance(table, HashedEmbedding)
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 0]])
    assert torch.equal(loaded.eval()(ids).last_hidden_state, model.eval()(ids).last_hidden_state)


def test_conv1d_of_gpt2_is_the_way_round_it_computes() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(24.0).view(4, 6) - 10)
    model: Any = sparsify(nn.Sequential(layer), {"targets": "*", "compress": {"name": "hashed", "ratio": 0.99}})
    assert model[0].weight.shape == (6, 4)
    # With nearly as many buckets as entries, many entries are alone in theirs, and exact.
    assert int(torch.count_nonzero(model[0].weight == layer.weight.t())) >= 6
