"""The algorithms against numbers worked out by hand on paper: signs, revival, counts, corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import Pruner, SparsityConfig, sparsify
from hf_sparse.pruning.masked_weight import hidden, masked_weight
from hf_sparse.pruning.schedules import Cubic
from hf_sparse.pruning.selection import Global, Uniform


def layer(weight: list[list[float]]) -> Any:
    values = torch.tensor(weight)
    linear = nn.Linear(values.shape[1], values.shape[0], bias=False)
    linear.weight = nn.Parameter(values)
    return nn.Sequential(linear)


def prune(model: nn.Module, **config: Any) -> Pruner:
    return Pruner(model, SparsityConfig(targets="*", schedule="constant", **config)).attach()


def scores(pruner: Pruner, index: int = 0) -> Tensor:
    found = pruner.units[index].masked.scores
    assert found is not None
    return found


def test_one_movement_step_on_two_by_two() -> None:
    # y = W x with x = (1, 2) and loss = y_1 - 3 y_2, so dL/dW' = ((1, 2), (-3, -6)).
    # dL/dS = dL/dW' * W = ((1*1, 2*-1), (-3*2, -6*0.5)) = ((1, -2), (-6, -3)), and S = 0 - 0.1 * dL/dS.
    model = layer([[1.0, -1.0], [2.0, 0.5]])
    pruner = prune(model, sparsity=0.5, scorer="movement")
    optimizer = torch.optim.SGD([{"params": [hidden(model[0])], "lr": 0.01}, {"params": [scores(pruner)], "lr": 0.1}])
    output = model(torch.tensor([1.0, 2.0]))
    (output[0] - 3 * output[1]).backward()
    optimizer.step()
    torch.testing.assert_close(scores(pruner).detach(), torch.tensor([[-0.1, 0.2], [0.6, 0.3]]))
    torch.testing.assert_close(hidden(model[0]).detach(), torch.tensor([[0.99, -1.02], [2.03, 0.56]]))
    # The loss falls when 2.0 and 0.5 grow: they move away from zero and stay. 1.0 moves towards zero and goes first.
    pruner.step(1.0)
    assert pruner.units[0].masked.mask.tolist() == [[False, False], [True, True]]
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[0.0, 0.0], [2.03, 0.56]]))


def test_a_removed_weight_keeps_its_value_learns_its_score_and_comes_back() -> None:
    model = layer([[4.0, 1.0]])
    pruner = prune(model, sparsity=0.5, scorer="movement")
    with torch.no_grad():
        scores(pruner).copy_(torch.tensor([[0.0, 0.05]]))
    pruner.step(1.0)
    assert model[0].weight.tolist() == [[0.0, 1.0]]

    # loss = -y with x = (1, 1): dL/dW' = (-1, -1). The removed 4.0 gets no gradient of its own, but its score gets
    # dL/dS = -1 * 4 with the unmasked weight: S_1 = 0 + 0.1 * 4 = 0.4, above S_2 = 0.05 + 0.1 * 1 = 0.15.
    (-model(torch.ones(2))).sum().backward()
    assert hidden(model[0]).grad.tolist() == [[0.0, -1.0]]  # type: ignore[union-attr]
    torch.optim.SGD([scores(pruner)], lr=0.1).step()
    torch.testing.assert_close(scores(pruner).detach(), torch.tensor([[0.4, 0.15]]))
    pruner.step(1.0)
    assert model[0].weight.tolist() == [[4.0, 0.0]]


def test_block_scores_get_the_sum_over_their_block() -> None:
    # loss = sum of y with x = (1, 2, 3, 4): dL/dW' has rows (1, 2, 3, 4), W is all 2, blocks are 1 x 2.
    model = layer([[2.0] * 4] * 2)
    pruner = prune(model, sparsity=0.5, scorer="movement", pattern={"name": "block", "rows": 1, "cols": 2})
    model(torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores(pruner).grad.tolist() == [[6.0, 14.0], [6.0, 14.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 100), (0.5, 50), (0.9, 10), (0.97, 3), (0.995, 1)])
def test_kept_count_is_exact_when_all_scores_are_equal(sparsity: float, kept: int) -> None:
    model = layer([[1.0] * 10] * 10)
    pruner = prune(model, sparsity=sparsity, scorer="movement")
    pruner.step(1.0)
    mask = pruner.units[0].masked.mask.view(-1)
    assert mask.nonzero().view(-1).tolist() == list(range(kept))  # ties go to the lower index


def test_kept_count_is_decimal_not_binary() -> None:
    # int((1 - 0.9) * 1000) is 99 in binary floating point.
    assert int(Uniform().select([torch.rand(1000)], 0.9)[0].sum()) == 100


def test_cubic_schedule_at_its_corners() -> None:
    # T = 100 steps, from 0.1 at step 20 to 0.9 at step 60.
    schedule = Cubic(begin=0.2, end=0.6, initial=0.1)

    def at(step: int) -> float:
        return schedule(step / 100, 0.9)

    assert at(0) == 0.1
    assert at(20) == 0.1
    assert at(21) == pytest.approx(0.9 - 0.8 * (39 / 40) ** 3)
    assert at(40) == pytest.approx(0.9 - 0.8 * 0.125)  # half-way: 0.8
    assert at(60) == 0.9
    assert at(100) == 0.9


def test_global_differs_from_local_when_layers_differ_in_scale() -> None:
    small, large = torch.tensor([[1.0, 2.0]]), torch.tensor([[30.0, 40.0]])
    assert [mask.tolist() for mask in Uniform().select([small, large], 0.5)] == [[[False, True]], [[False, True]]]
    assert [mask.tolist() for mask in Global().select([small, large], 0.5)] == [[[False, False]], [[True, True]]]


def test_two_of_four_along_the_inputs() -> None:
    model = layer([[1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0], [0.1, 0.2, -0.3, 0.4, 9.0, -8.0, 7.0, 6.0]])
    sparsify(model, SparsityConfig(targets="*", pattern="2:4"))
    expected = [[0.0, -4.0, 3.0, 0.0, 5.0, 5.0, 0.0, 0.0], [0.0, 0.0, -0.3, 0.4, 9.0, -8.0, 0.0, 0.0]]
    assert torch.equal(model[0].weight.detach(), torch.tensor(expected))


def test_zeros_are_positive_and_infinities_do_not_become_nan() -> None:
    model = layer([[-1.0, float("-inf")], [-3.0, 4.0]])
    pruner = prune(model, sparsity=0.5)
    masked = masked_weight(model[0])
    assert masked is not None
    masked.mask.copy_(torch.tensor([[False, False], [True, True]]))
    parameter = hidden(model[0])
    pruner.bake()
    assert not torch.signbit(model[0].weight[0]).any()
    assert model[0].weight.tolist() == [[0.0, 0.0], [-3.0, 4.0]]
    assert model[0].weight is parameter  # the optimizer still holds the right one


def test_gradient_scorers_sum_over_steps_and_over_accumulated_batches() -> None:
    # dL/dW' = x for loss = sum of y. Two batches in one step: |1 + 2| and |-1 + 4|; then one batch: |-5| and |1|.
    model = layer([[2.0, 10.0]])
    pruner = prune(model, sparsity=0.5, scorer="gradient")
    for batches in ([(1.0, -1.0), (2.0, 4.0)], [(-5.0, 1.0)]):
        for x in batches:
            model(torch.tensor(x)).sum().backward()
        pruner.observe()
    assert pruner.units[0].masked.get_buffer("importance").tolist() == [[8.0, 4.0]]

    model = layer([[2.0, 10.0]])
    pruner = prune(model, sparsity=0.5, scorer={"name": "taylor", "momentum": 0.5})
    for x in [(1.0, -1.0), (-5.0, 1.0)]:
        model(torch.tensor(x)).sum().backward()
        pruner.observe()
    assert pruner.units[0].masked.get_buffer("importance").tolist() == [[11.0, 15.0]]


def test_soft_movement_penalty_and_its_steering() -> None:
    # sigmoid(0) = 0.5 and sigmoid(ln 3) = 0.75: the mean over the weight is 0.625. At full level, 8 * 0.625 = 5.
    model = layer([[1.0, 1.0]])
    pruner = prune(model, sparsity=0.5, scorer={"name": "soft_movement", "penalty_strength": 8.0})
    with torch.no_grad():
        scores(pruner).copy_(torch.tensor([[0.0, 1.0986123]]))
    assert float(pruner.penalty().detach()) == 0.0  # nothing is pruned yet, so nothing is pulled down
    pruner.step(1.0)
    assert pruner.units[0].masked.mask.tolist() == [[False, True]]
    # The cut is at sigmoid 0.75, far above the 0.1 that it is to reach: the pull has grown, by 2 % at most.
    assert float(pruner.penalty().detach()) == pytest.approx(5.0 * 1.0202, rel=1e-3)
    with torch.no_grad():
        scores(pruner).copy_(torch.tensor([[-9.0, -8.0]]))
    scorer: Any = pruner.groups[0].scorer
    before = float(scorer.strength)
    pruner.step(1.0)
    assert float(scorer.strength) < before
