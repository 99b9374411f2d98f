"""A teacher in a Trainer that prunes nothing: what it adds to the loss, what it logs, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_sparse import RecipeError
from hf_sparse.hf.trainer.distillation_callback import DistillationCallback
from tests.helpers.training import Rows, arguments, bert

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TAUGHT = {"teacher": "elsewhere", "task_weight": 0.0, "logits_weight": 1.0}


def trainer_of(folder: Path, teacher: torch.nn.Module, options: dict[str, Any] | None = None, **args: Any) -> Trainer:
    callback = DistillationCallback(TAUGHT, teacher)
    return Trainer(
        bert(**NO_DROPOUT), arguments(folder, **args), train_dataset=Rows(), callbacks=[callback], **(options or {})
    )


def test_model_that_learns_from_its_equal_stays_as_it_is(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, bert(**NO_DROPOUT), optim="sgd")
    trainer.train()
    for name, tensor in bert(**NO_DROPOUT).state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_model_comes_nearer_to_its_teacher_and_the_log_says_so(tmp_path: Path) -> None:
    teacher = bert(**NO_DROPOUT)
    with torch.no_grad():
        teacher.classifier.bias.copy_(torch.tensor([2.0, -2.0]))
    trainer = trainer_of(tmp_path, teacher, learning_rate=1e-2)
    trainer.train()
    logged = [log["distillation_kl"] for log in trainer.state.log_history if "loss" in log]
    assert logged[-1] < 0.2 * logged[0]
    model: Any = trainer.model
    assert not model._forward_hooks  # the teacher is gone
    trainer.train()  # and comes again in another run


def test_what_cannot_be_heard_is_refused_before_step_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher 'self' is for a model that is pruned"):
        DistillationCallback({"teacher": "self"})
    with pytest.raises(RecipeError, match=r"label_smoothing_factor=0.1 replaces the model's own loss"):
        trainer_of(tmp_path, bert(), label_smoothing_factor=0.1).train()

    def own(outputs: Any, labels: Any, **_: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    with pytest.raises(RecipeError, match="compute_loss_func replaces the model's own loss"):
        trainer_of(tmp_path, bert(), {"compute_loss_func": own}).train()
