"""Static connectivity: fan-in and fan-out by hand, nested masks, seeds, and no use of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import PatternError, RecipeError, sparsify
from hf_sparse.config.sparsity import PATTERNS
from hf_sparse.pruning.selection.connectivity import ranks

KINDS = ("expander", "radix", "random")


def mask(kind: str, rows: int, columns: int, sparsity: float, seed: int = 0) -> Tensor:
    spec = {"name": kind, "seed": seed}
    selected: list[Tensor] = PATTERNS.build(spec).own_selection().select([torch.zeros(rows, columns)], sparsity)
    return selected[0]


def test_radix_by_hand() -> None:
    # Two of eight inputs: shifts 0 and 4, the first two in bit-reversed order.
    expected = [[(j - i) % 8 in (0, 4) for j in range(8)] for i in range(8)]
    assert mask("radix", 8, 8, 0.75).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (48, 72), (1, 5), (5, 1)])
def test_every_output_has_as_many_inputs(kind: str, shape: tuple[int, int]) -> None:
    rank = ranks(kind, *shape, seed=3)  # type: ignore[arg-type]
    assert torch.equal(rank.sort(1).values, torch.arange(shape[1]).expand(shape))
    kept = mask(kind, *shape, 0.8)
    assert set(kept.sum(1).tolist()) == {max(1, int(0.2 * shape[1] + 1e-9))}


@pytest.mark.parametrize("kind", ["expander", "radix"])
@pytest.mark.parametrize(("shape", "sparsity"), [((64, 64), 0.875), ((256, 64), 0.875), ((64, 256), 0.875)])
def test_every_input_has_as_many_outputs(kind: str, shape: tuple[int, int], sparsity: float) -> None:
    kept = mask(kind, *shape, sparsity)
    assert set(kept.sum(0).tolist()) == {shape[0] // 8}


@pytest.mark.parametrize("kind", KINDS)
def test_more_sparsity_keeps_a_part_of_less(kind: str) -> None:
    less, more = mask(kind, 40, 50, 0.5), mask(kind, 40, 50, 0.9)
    assert bool((less | ~more).all())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_not_matter_and_seeds_do(kind: str) -> None:
    def pruned(scale: float, seed: int) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(32, 32)
        with torch.no_grad():
            layer.weight.mul_(scale).add_(0.5)
        model: Any = sparsify(
            nn.Sequential(layer), {"targets": "*", "pattern": {"name": kind, "seed": seed}, "sparsity": 0.75}
        )
        kept: Tensor = model[0].weight != 0
        return kept

    assert torch.equal(pruned(1.0, 0), pruned(-3.0, 0))
    assert torch.equal(pruned(1.0, 0), pruned(1.0, 1)) == (kind == "radix")


def test_expander_mixes_and_radix_alone_does_not() -> None:
    """The second singular value of a d-regular mask, relative to d: near 2 sqrt(d-1)/d for random ones."""
    values = torch.linalg.svdvals(mask("expander", 256, 256, 0.875).double())
    assert float(values[0]) == pytest.approx(32)
    assert float(values[1] / values[0]) < 0.55
    structured = torch.linalg.svdvals(mask("radix", 256, 256, 0.875).double())
    assert float(structured[1] / structured[0]) == pytest.approx(1)  # it falls into pieces, which the next layer joins


def test_layers_of_one_shape_differ() -> None:
    model: Any = sparsify(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), {"targets": "*", "pattern": "expander", "sparsity": 0.75}
    )
    assert not torch.equal(model[0].weight != 0, model[1].weight != 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="`seed`"):
        PATTERNS.build({"name": "expander", "seed": -1})
    with pytest.raises(PatternError, match="selection of its own"):
        sparsify(
            nn.Sequential(nn.Linear(8, 8)),
            {"targets": "*", "pattern": "radix", "selection": "global", "sparsity": 0.5},
        )
