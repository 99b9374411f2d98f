"""The most likely classes and one for the rest: by hand, and exact where at most one class is merged."""

from __future__ import annotations

import pytest
import torch

from hf_sparse import SparsityError
from hf_sparse.distillation.losses import soft_target_kl
from hf_sparse.distillation.top_logits import TopLogits, top_logits, top_logits_kl


def both(classes: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, classes, generator=generator) * 3, torch.randn(2, 5, classes, generator=generator) * 3


def test_kl_of_merged_classes_by_hand() -> None:
    student, teacher = both()
    p = (teacher.double() / 2).softmax(-1)
    q = (student.double() / 2).softmax(-1)
    expected = 0.0
    for row in range(2):
        for place in range(5):
            order = teacher[row, place].tolist()
            top = [order.index(value) for value in sorted(order, reverse=True)[:3]]
            parts = [(float(p[row, place, c]), float(q[row, place, c])) for c in top]
            parts.append((1 - sum(a for a, _ in parts), 1 - sum(b for _, b in parts)))
            expected += sum(a * torch.log(torch.tensor(a / b, dtype=torch.float64)).item() for a, b in parts)
    found = top_logits_kl(student, top_logits(teacher, 3, 2.0), 2.0)
    assert float(found) == pytest.approx(4 * expected / 10, rel=1e-5)


@pytest.mark.parametrize("count", [10, 11, 500])
def test_all_classes_are_the_full_divergence_with_its_gradient(count: int) -> None:
    student, teacher = both()
    valid = torch.tensor([[True] * 5, [True, True, False, False, True]])
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    found = top_logits_kl(ours, top_logits(teacher, count, 2.0), 2.0, valid, count=7)
    expected = soft_target_kl(theirs, teacher, 2.0, valid, count=7)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_fewer_classes_are_less_and_equal_logits_nothing() -> None:
    student, teacher = both()
    values = [float(top_logits_kl(student, top_logits(teacher, k, 1.0), 1.0)) for k in (1, 2, 4, 8, 10)]
    assert values == sorted(values)
    assert values[0] < 0.9 * values[-1]
    assert float(top_logits_kl(teacher, top_logits(teacher, 2, 1.0), 1.0)) == pytest.approx(0, abs=1e-6)


def test_a_sure_teacher_gives_finite_gradients() -> None:
    student, teacher = both()
    teacher[..., 3] += 500  # all others together have a probability of 0
    student = (student * 100).requires_grad_()
    top_logits_kl(student, top_logits(teacher, 2, 1.0), 1.0).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(
    "teacher",
    [
        TopLogits(torch.zeros(2, 5, 2), torch.full((2, 5, 2), 11), torch.zeros(2, 5)),
        TopLogits(torch.zeros(2, 5, 2), torch.full((2, 5, 2), -1), torch.zeros(2, 5)),
        TopLogits(torch.zeros(2, 4, 2), torch.zeros(2, 4, 2, dtype=torch.long), torch.zeros(2, 4)),
    ],
)
def test_other_classes_or_positions_are_refused(teacher: TopLogits) -> None:
    with pytest.raises(SparsityError, match="need the same vocabulary and tokenizer"):
        top_logits_kl(both()[0], teacher, 1.0)
