"""A packed BERT to export."""

from __future__ import annotations

import pytest

from hf_sparse.cli.main import main
from tests.helpers.tiny import save_bert


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Return the folder of a packed BERT, half of whose weights are gone."""
    folder = tmp_path_factory.mktemp("sparse")
    dense = save_bert(folder / "dense", head=True)
    assert main(["prune", str(dense), "--sparsity", "0.5", "--output", str(folder / "sparse")]) == 0
    return folder / "sparse"
