"""Head importance: by hand, one sample at a time, and against the definition by finite differences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMultipleChoice

from hf_sparse import PatternError, SparsityError, compact
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.pruning.head_importance import head_importance
from tests.helpers import structures


class T5Attention(nn.Module):
    """Two heads of one number each, that give value times input; with the names of T5."""

    def __init__(self) -> None:
        super().__init__()
        self.key_value_proj_dim = 1
        self.q, self.k, self.v = (nn.Linear(1, 2, bias=False) for _ in range(3))
        self.o = nn.Linear(2, 1, bias=False)
        self.v.weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        self.o.weight.data.copy_(torch.tensor([[3.0, 1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.v(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = T5Attention()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return SimpleNamespace(loss=(self.attention(x).sum((1, 2)) * labels).mean())


def test_importance_by_hand() -> None:
    # L = y * (3 * 1 x + 1 * 2 x), so dL/dxi = y (3 x, 2 x). The samples (x, y) = (1, 1), (2, -1) and (3, 1) give
    # (3, 2), (-6, -4) and (9, 6): absolute values first, (3 + 6 + 9) / 3 = 6 and 4. Not (2, 4/3).
    x, labels = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.tensor([1.0, -1.0, 1.0])
    for sizes in ((3,), (2, 1), (1, 1, 1)):
        batches = zip(x.split(list(sizes)), labels.split(list(sizes)), strict=True)
        found = head_importance(Model(), [{"x": rows, "labels": target} for rows, target in batches])
        torch.testing.assert_close(found, torch.tensor([[6.0, 4.0]]))


# T5 has a norm that is always computed in float32, so its loss is too rough for a small step.
@pytest.mark.parametrize(
    ("family", "step", "close"), [("bert", 1e-5, 1e-6), ("distilbert", 1e-5, 1e-6), ("t5-gated", 1e-3, 5e-4)]
)
def test_importance_is_the_derivative_of_the_loss_by_a_gate(family: str, step: float, close: float) -> None:
    model = structures.build(family).double()
    batches = []
    for seed in range(3):
        batch = structures.batch(family, seed)
        batches += [{name: tensor[:1] for name, tensor in batch.items()}]
    expected = []
    for block in find_sub_blocks(model, "a test"):
        if block.kind != "attention":
            continue
        expected.append([0.0] * block.groups)
        for head in range(block.groups):
            columns = slice(head * block.size, (head + 1) * block.size)
            own, losses = block.output.weight.detach().clone(), []
            for gate in (1 + step, 1 - step):
                with torch.no_grad():
                    block.output.weight[:, columns] *= gate
                    losses.append([float(model(**batch).loss) for batch in batches])
                    block.output.weight.copy_(own)
            slopes = [abs(high - low) / (2 * step) for high, low in zip(*losses, strict=True)]
            expected[-1][head] = sum(slopes) / len(slopes)
    torch.testing.assert_close(head_importance(model, batches), torch.tensor(expected), rtol=100 * close, atol=close)


def test_batches_of_several_samples_give_what_single_samples_do() -> None:
    model, batch = structures.build("bert"), structures.batch("bert")
    single = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
    torch.testing.assert_close(head_importance(model, [batch]), head_importance(model, single))


def test_rows_of_one_question_are_one_sample() -> None:
    options: dict[str, Any] = structures.SIZES
    torch.manual_seed(0)
    model = BertForMultipleChoice(BertConfig(**options))
    ids = torch.randint(5, structures.VOCABULARY, (3, 2, 6))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}
    single = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
    torch.testing.assert_close(head_importance(model, [batch]), head_importance(model, single))


def test_model_is_left_as_it_was() -> None:
    model = structures.build("bert", attention_probs_dropout_prob=0.5).train()
    model.requires_grad_(False)
    first, second = (head_importance(model, [structures.batch("bert")]) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert bool((first > 0).all())


def test_removed_heads_are_nan_and_the_others_keep_their_place() -> None:
    model = structures.build("bert")
    structures.remove_others(model, {"bert.encoder.layer.0.attention": [1, 3], "bert.encoder.layer.1.attention": []})
    before = head_importance(model, [structures.batch("bert")])
    assert before[0, 0] == before[1, 2] == 0.0
    compact(model)
    after = head_importance(model, [structures.batch("bert")])
    assert torch.equal(after.isnan(), torch.tensor([[True, False, True, False], [True] * 4]))
    torch.testing.assert_close(after[0, [1, 3]], before[0, [1, 3]])


def test_what_cannot_be_done_is_said() -> None:
    model, batch = structures.build("bert"), structures.batch("bert")
    with pytest.raises(SparsityError, match="there was no batch"):
        head_importance(model, [])
    with pytest.raises(SparsityError, match="returned no loss"):
        head_importance(model, [{"input_ids": batch["input_ids"]}])
    with pytest.raises(SparsityError, match=r"the first sides are \[2, 3\]"):
        head_importance(model, [{**batch, "labels": batch["labels"][:2]}])
    with pytest.raises(PatternError, match="head importance needs to know"):
        head_importance(nn.Linear(2, 2), [batch])
    assert not any(module._forward_pre_hooks for module in model.modules())
