from __future__ import annotations

import torch

from hf_sparse.pruning.patterns import Element


def test_element_takes_weights_of_any_shape() -> None:
    Element().check((2, 3, 4), "conv.weight")
    assert Element().groups_shape((2, 3, 4)) == (2, 3, 4)


def test_element_pools_and_expands_to_the_same() -> None:
    scores, kept = torch.rand(2, 3), torch.rand(2, 3) > 0.5
    assert torch.equal(Element().pool(scores), scores)
    assert torch.equal(Element().pool(scores, "sum"), scores)
    assert torch.equal(Element().expand(kept, (2, 3)), kept)
