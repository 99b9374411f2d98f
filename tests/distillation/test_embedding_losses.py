"""Losses of embeddings, by hand."""

from __future__ import annotations

import pytest
import torch

from hf_sparse import DistillationConfig, RecipeError, SparsityError
from hf_sparse.config.distillation import TERMS
from hf_sparse.distillation.losses import cosine_distance, similarity_mse
from hf_sparse.distillation.terms import Comparison

S = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
T = torch.tensor([[4.0, 3.0], [2.0, 0.0]])


def value(name: str, student: torch.Tensor, teacher: torch.Tensor, share: float = 1.0) -> float:
    pair = Comparison({"sentence_embedding": student}, {"sentence_embedding": teacher}, {}, DistillationConfig(), share)
    return float(TERMS.build(name).value(pair))


def test_cosine_by_hand() -> None:
    assert value("embedding_cosine", S, T) == pytest.approx(((1 - 24 / 25) + 0) / 2)
    assert value("embedding_cosine", S, T, share=0.25) == pytest.approx(0.02 / 4)


def test_mse_by_hand() -> None:
    assert value("embedding_mse", S, T) == pytest.approx((1 + 1 + 1 + 0) / 4)


def test_similarity_by_hand() -> None:
    # Both off-diagonal cosines: 3/5 for the student, 4/5 for the teacher.
    assert value("embedding_similarity", S, T) == pytest.approx(0.2**2, rel=1e-5)


def test_similarity_does_not_change_under_a_rotation_and_takes_another_width() -> None:
    wide = torch.cat([T, torch.zeros(2, 3)], dim=1)
    assert similarity_mse(T, wide).item() == pytest.approx(0.0, abs=1e-12)
    assert similarity_mse(S[:1], T[:1]).item() == 0.0


def test_gradient_of_the_cosine_does_not_change_the_length() -> None:
    student = S.clone().requires_grad_()
    cosine_distance(student, T).backward()
    assert student.grad is not None
    torch.testing.assert_close((student.grad * student).sum(1), torch.zeros(2), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["embedding_cosine", "embedding_mse"])
def test_other_widths_are_refused(name: str) -> None:
    with pytest.raises(SparsityError, match=r"embeddings|states"):
        value(name, S, torch.zeros(2, 5))


def test_a_model_that_gives_no_embedding_is_refused() -> None:
    pair = Comparison({"logits": S}, {"sentence_embedding": T}, {}, DistillationConfig())
    with pytest.raises(SparsityError, match="the model returns none"):
        TERMS.build("embedding_cosine").value(pair)


def test_default_is_logits_or_for_embeddings_their_cosine() -> None:
    config = DistillationConfig()
    assert config.weights() == {"logits": 0.9}
    assert config.weights(embeds=True) == {"embedding_cosine": 0.9}
    more = DistillationConfig(losses={"embedding_similarity": 5.0})
    assert more.weights() == more.weights(embeds=True) == {"embedding_similarity": 5.0}
    assert DistillationConfig(logits_weight=1.0).weights(embeds=True) == {"logits": 1.0}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"embedding_cosin": 1.0}, "unknown distillation loss 'embedding_cosin'; did you mean 'embedding_cosine'"),
        ({"embedding_cosine": -1.0}, r"`distillation.losses.embedding_cosine` must be in \[0, inf\), got -1.0"),
        ({"embedding_cosine": {"weight": 1.0, "speed": 2}}, "has no key 'speed'"),
        ({"embedding_cosine": 0.0}, "must be above 0, got 0 for all"),
        (["embedding_cosine"], "mapping"),
    ],
)
def test_losses_that_cannot_be_are_errors(losses: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DistillationConfig.from_dict({"losses": losses})


def test_config_with_losses_round_trips() -> None:
    config = DistillationConfig(losses={"embedding_cosine": {"weight": 2.0}, "hidden": 1})
    assert DistillationConfig.from_dict(config.to_dict()) == config
    assert config.weights() == {"embedding_cosine": 2.0, "hidden": 1.0}


def test_only_logits_and_embeddings_are_cached() -> None:
    assert DistillationConfig(losses={"embedding_cosine": 1.0}, cache="x").cache == "x"
    with pytest.raises(RecipeError, match=r"hidden must be 0 with `distillation\.cache`"):
        DistillationConfig(losses={"embedding_cosine": 1.0, "hidden": 1.0}, cache="x")
