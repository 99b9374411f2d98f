"""A dense checkpoint as others publish it."""

from __future__ import annotations

import json

import pytest

from hf_sparse import SparsityConfig, sparsify
from tests.helpers import tiny
from tests.helpers.training import bert


@pytest.fixture
def dense(tmp_path):
    """A folder as others publish it: a dense model at 80 % zeros, with a tokenizer, a pickle and an index of lies."""
    sparsify(bert(), SparsityConfig(sparsity=0.8)).save_pretrained(tmp_path / "dense", format="dense")
    tiny.save_tokenizer(tmp_path / "dense")
    (tmp_path / "dense" / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "dense" / "README.md").write_text("about it")
    lies = {"weight_map": {"bert.pooler.dense.weight": "../../../etc/passwd"}}
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps(lies))
    return tmp_path / "dense"
