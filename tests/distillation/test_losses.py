"""Soft targets and hidden states, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_sparse import SparsityError
from hf_sparse.distillation.layer_map import nearest_pairs
from hf_sparse.distillation.losses import attention_mse, masked_mse, sigmoid_kl, soft_target_kl


def test_kl_of_two_classes_by_hand() -> None:
    # softmax of (ln 3, 0) is (3/4, 1/4), of (0, 0) it is (1/2, 1/2):
    # 3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = soft_target_kl(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), temperature=1.0)
    assert float(found) == pytest.approx(expected)


def test_kl_at_temperature_two_is_four_times_that_of_half_the_logits() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    hot = soft_target_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(hot, 4 * soft_target_kl(student / 2, teacher / 2, temperature=1.0))


def test_kl_is_the_mean_over_rows_and_agrees_with_torch() -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(soft_target_kl(student, teacher, 1.0), expected)


def test_kl_is_zero_with_zero_gradient_when_the_student_is_the_teacher() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    loss = soft_target_kl(logits, logits.detach().clone(), 2.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(4, 6), rtol=0, atol=1e-7)


def test_kl_over_positions_is_unchanged_by_padded_targets() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    s, t = (torch.cat([logits, 9 * torch.randn(2, 4, 5)], dim=1) for logits in (student, teacher))
    longer = torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    expected = soft_target_kl(student[valid], teacher[valid], 2.0)  # four real tokens
    torch.testing.assert_close(soft_target_kl(student, teacher, 2.0, valid), expected)
    torch.testing.assert_close(soft_target_kl(s, t, 2.0, longer), expected)


def test_kl_over_places_in_a_text_is_unchanged_by_padding_and_has_a_finite_gradient() -> None:
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    expected = soft_target_kl(student, teacher, 2.0)
    longer = torch.cat([student, torch.randn(2, 3)], dim=1)
    classes = torch.tensor([[True] * 4 + [False] * 3] * 2)
    found = soft_target_kl(longer, torch.cat([teacher, torch.randn(2, 3)], dim=1), 2.0, classes=classes)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_kl_of_parts_with_a_common_count_adds_up_to_the_kl_of_the_whole() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    valid = torch.arange(8) != 3
    whole = soft_target_kl(student, teacher, 2.0, valid)
    parts = [
        soft_target_kl(student[rows], teacher[rows], 2.0, valid[rows], count=7) for rows in (slice(0, 2), slice(2, 8))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_mse_is_the_mean_over_valid_positions_and_features() -> None:
    student = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[0.0, 0.0], [3.0, 3.0]]])
    teacher = torch.zeros(2, 2, 2)
    valid = torch.tensor([[True, False], [True, True]])
    assert float(masked_mse(student, teacher, valid)) == pytest.approx((1 + 4 + 9 + 9) / 6)
    assert float(masked_mse(student, teacher)) == pytest.approx((1 + 4 + 25 + 25 + 9 + 9) / 8)


@pytest.mark.parametrize("loss", [lambda s, t: soft_target_kl(s, t, 2.0), masked_mse, attention_mse])
def test_different_shapes_are_an_error_and_not_broadcast(loss) -> None:
    with pytest.raises(SparsityError, match=r"\(1, 3\) and the student's \(2, 3\)"):
        loss(torch.zeros(2, 3), torch.zeros(1, 3))


def states(*values: float) -> list[torch.Tensor]:
    return [torch.full((1, 2, 3), value) for value in values]


def test_layers_are_matched_from_the_top_by_distance_and_keep_their_order() -> None:
    # Teacher layer 3 (value 10) is nearest to student layer 1; layer 1 (value 9) may then take layer 0 only.
    assert nearest_pairs(states(0.0, 10.0, 4.0), states(1.0, 9.0, 2.0, 10.0), [1, 3]) == [(1, 3), (0, 1)]


def test_layers_that_are_gone_are_never_matched() -> None:
    # The nearest student layers in order of distance are 2, 0, 1: masking places of that order instead of layers
    # (as CoFi's reference does) would choose the removed layer 2.
    student, teacher = states(3.0, 9.0, 1.0), states(1.0)
    assert nearest_pairs(student, teacher, [0], present=[True, True, False]) == [(0, 0)]
    assert nearest_pairs(student, teacher, [0], present=[False, False, False]) == []


def test_a_teacher_layer_without_a_student_layer_below_goes_without() -> None:
    assert nearest_pairs(states(5.0, 0.0), states(4.0, 5.0), [0, 1]) == [(0, 1)]


def test_attention_mse_is_unchanged_by_padding_and_by_hand() -> None:
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    per_query = [
        float((student[row, :, query, :keys] - teacher[row, :, query, :keys]).square().mean())
        for row, keys in ((0, 4), (1, 2))
        for query in range(keys)
    ]
    found = attention_mse(student, teacher, valid)
    assert float(found) == pytest.approx(sum(per_query) / 6)
    more = (0, 5, 0, 5)
    one, other = (torch.nn.functional.pad(each, more, value=9.0) for each in (student, -teacher))
    padded = attention_mse(one, other, torch.nn.functional.pad(valid, (0, 5)))
    assert float(padded) == pytest.approx(float(attention_mse(student, -teacher, valid)))


def test_sigmoid_kl_is_the_sum_of_independent_bernoulli_divergences() -> None:
    student, teacher, temperature = torch.randn(3, 4), torch.randn(3, 4), 2.0
    p, q = (teacher / temperature).sigmoid().double(), (student / temperature).sigmoid().double()
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * temperature**2
    assert float(sigmoid_kl(student, teacher, temperature)) == pytest.approx(float(by_hand), rel=1e-5)


def test_sigmoid_kl_has_the_gradient_of_binary_cross_entropy_with_the_probabilities_of_the_teacher() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (ours,) = torch.autograd.grad(sigmoid_kl(student, teacher, 1.0), student)
    target = torch.nn.functional.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    (expected,) = torch.autograd.grad(target, student)
    torch.testing.assert_close(ours, expected)


def test_sigmoid_kl_is_finite_for_logits_of_any_size() -> None:
    logits = torch.tensor([[300.0, -300.0]], requires_grad=True)
    value = sigmoid_kl(logits, -logits.detach(), 1.0)
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_sigmoid_kl_leaves_padding_out() -> None:
    student, teacher = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    teacher[0, 1] = 50.0
    valid = torch.tensor([[True, False]])
    torch.testing.assert_close(
        sigmoid_kl(student, teacher, 1.0, valid), sigmoid_kl(student[:, :1], teacher[:, :1], 1.0)
    )
