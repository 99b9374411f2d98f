"""A teacher in the same callback: what it adds to the loss, under any way of batching, and what cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_sparse import DistillationConfig, RecipeError, SparsityCallback, SparsityConfig, SparsityError, summarize
from hf_sparse.distillation.distiller import Distiller
from hf_sparse.distillation.layer_map import uniform_pairs
from hf_sparse.hf.trainer.teacher import make_distiller
from tests.helpers import tiny
from tests.helpers.training import RAMP, Rows, arguments, bert

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MOVEMENT = SparsityConfig(sparsity=0.5, scorer="movement", schedule=RAMP)
LATE = SparsityConfig(sparsity=0.5, schedule={"name": "linear", "begin": 0.7, "end": 0.9})


def taught_trainer(folder: Path, model: Any, teacher: Any = "self", config: Any = MOVEMENT, **options: Any) -> Any:
    distillation = options.pop("distillation", None)
    callback = SparsityCallback(config, teacher=teacher, distillation=distillation)
    return Trainer(model, arguments(folder, **options), train_dataset=Rows(), callbacks=[callback])


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


# -- in the Trainer --------------------------------------------------------------------------------------------------


def test_self_is_the_model_before_pruning_so_the_first_kl_is_zero(tmp_path: Path) -> None:
    trainer = taught_trainer(tmp_path, bert(**NO_DROPOUT), config=LATE, logging_steps=1)
    trainer.train()
    kl = logged(trainer, "distillation_kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert kl[1] > 0  # the student has made a step by then, the teacher has not
    assert summarize(trainer.model).sparsity == pytest.approx(0.5, abs=1e-3)


def test_student_learns_what_only_the_teacher_knows(tmp_path: Path) -> None:
    teacher = bert(**NO_DROPOUT)
    with torch.no_grad():
        teacher.classifier.bias.copy_(torch.tensor([3.0, -3.0]))  # says "0" to everything, whatever the labels are
    weights = {"task_weight": 0.0, "logits_weight": 1.0}
    trainer = taught_trainer(
        tmp_path, bert(**NO_DROPOUT), teacher, distillation=weights, max_steps=60, learning_rate=3e-3
    )
    trainer.train()
    kl = logged(trainer, "distillation_kl")
    assert kl[-1] < 0.2 * kl[0]
    with torch.no_grad():
        found = trainer.model(input_ids=Rows(16).ids).logits.argmax(-1)
    assert found.tolist() == [0] * 16


def test_neither_teacher_nor_hooks_are_left_in_the_model_or_its_checkpoint(tmp_path: Path) -> None:
    trainer = taught_trainer(
        tmp_path, bert(), distillation={"hidden_weight": 0.5}, save_strategy="steps", save_steps=10
    )
    model: Any = trainer.model
    plain = set(bert().state_dict())
    trainer.train()
    assert set(model.state_dict()) == plain
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model.base_model.encoder.layer[0].output.dense.weight.requires_grad
    for folder in (tmp_path / "checkpoint-10", tmp_path / "checkpoint-20"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_teacher_is_the_same_at_the_end(tmp_path: Path) -> None:
    teacher = bert()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    taught_trainer(tmp_path, bert(), teacher, distillation={"hidden_weight": 1.0}).train()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("term", "weights"),
    [("distillation_kl", {}), ("distillation_hidden", {"logits_weight": 0.0, "hidden_weight": 1.0})],
)
def test_gradient_does_not_depend_on_how_a_batch_is_accumulated(
    term: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    teacher = bert(**NO_DROPOUT)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = []
    for accumulate in (1, 4):
        trainer = taught_trainer(
            tmp_path, bert(**NO_DROPOUT), teacher, config=SparsityConfig(sparsity=0.1, schedule="constant"),
            distillation={"task_weight": 0.0, **weights}, optim="sgd", max_steps=1, logging_steps=1, max_grad_norm=0.0,
            learning_rate=1.0, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        found.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        assert logged(trainer, term)[0] > 0
    start = bert(**NO_DROPOUT).state_dict()
    moved = {name for name, tensor in start.items() if not torch.equal(tensor, found[0][name])}
    assert any("layer.1.output" in name for name in moved)
    for name in moved:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-6)


def test_a_folder_can_be_the_teacher(tmp_path: Path) -> None:
    bert(**NO_DROPOUT).save_pretrained(tmp_path / "teacher")
    trainer = taught_trainer(
        tmp_path, bert(**NO_DROPOUT), str(tmp_path / "teacher"), config=LATE, logging_steps=1, max_steps=10
    )
    trainer.train()
    assert logged(trainer, "distillation_kl")[0] == pytest.approx(0.0, abs=1e-9)


def test_a_folder_in_eight_bits_can_be_the_teacher(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="8-bit teachers are loaded by bitsandbytes")
    bert(**NO_DROPOUT).save_pretrained(tmp_path / "teacher")
    config = {"teacher": str(tmp_path / "teacher"), "load_in_8bit": True}
    trainer = taught_trainer(
        tmp_path, bert(**NO_DROPOUT), None, distillation=config, config=LATE, logging_steps=1, max_steps=10
    )
    trainer.train()
    assert logged(trainer, "distillation_kl")[0] < 1e-3  # rounded weights, so not zero


# -- other heads -----------------------------------------------------------------------------------------------------


def terms(model: Any, teacher: Any, config: DistillationConfig, batch: dict[str, Any]) -> torch.Tensor:
    distiller = make_distiller(model, config, teacher)
    outputs = model.eval()(**batch, **distiller.wanted())
    return distiller.loss(outputs, (), batch, 1.0)


def t5(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    options: dict[str, Any] = {"vocab_size": 40, "decoder_start_token_id": 0, **sizes}
    return T5ForConditionalGeneration(T5Config(**options))


@pytest.mark.parametrize("weights", [{}, {"logits_weight": 0.0, "hidden_weight": 1.0}], ids=["logits", "hidden"])
def test_padded_targets_of_an_encoder_decoder_change_nothing(weights: dict[str, Any]) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    labels = torch.tensor([[3, 4, 5, 1], [6, 1, -100, -100]])
    longer = torch.cat([labels, torch.full((2, 3), -100)], dim=1)
    config = DistillationConfig(**weights)
    losses = [
        terms(t5(0), t5(1), config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": found})
        for found in (labels, longer)
    ]
    assert float(losses[0].detach()) > 0
    torch.testing.assert_close(losses[1], losses[0])
    padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    torch.testing.assert_close(
        terms(t5(0), t5(1), config, {"input_ids": padded, "attention_mask": mask, "labels": labels}), losses[0]
    )


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_causal_models_are_taught_where_the_next_token_is_trained() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8]])  # a prompt of two tokens
    student, teacher = llama(0), llama(1)
    found = terms(student, teacher, DistillationConfig(logits_weight=1.0), {"input_ids": ids, "labels": labels})
    with torch.no_grad():
        s, t = (model.eval()(ids).logits[0, 1:3] / 2 for model in (student, teacher))  # these predict 7 and 8
    expected = 4 * torch.nn.functional.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(found, expected)


def spans(seed: int) -> Any:
    torch.manual_seed(seed)
    return BertForQuestionAnswering(tiny.config())


def test_span_heads_are_taught_start_and_end_over_real_positions_only() -> None:
    ids = torch.tensor([[2, 5, 6, 3]])
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    long = {
        "input_ids": torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0]]),
    }
    config = DistillationConfig()
    first, second = (terms(spans(0), spans(1), config, batch) for batch in (short, long))
    assert float(first) > 0
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-7)


def test_a_regression_is_taught_by_the_squared_difference() -> None:
    class Says(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
            return {"logits": torch.full((2, 1), self.value)}

    distiller = Distiller(Says(3.0), DistillationConfig(logits_weight=0.5))
    assert float(distiller.loss(Says(1.0)(), (), {}, 1.0)) == 0.5 * 4.0


def test_attention_maps_are_compared_under_eager_attention() -> None:
    def eager(seed: int) -> Any:
        torch.manual_seed(seed)
        return BertForSequenceClassification._from_config(tiny.config(num_labels=2), attn_implementation="eager")

    batch = {"input_ids": Rows(2).ids, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    config = DistillationConfig(logits_weight=0.0, attention_weight=1.0)
    student = eager(0)
    assert float(terms(student, eager(1), config, batch)) > 0
    assert float(terms(student, student, config, batch)) == 0.0
    pad = torch.nn.functional.pad
    longer = {"input_ids": pad(batch["input_ids"], (0, 6)), "attention_mask": pad(batch["attention_mask"], (0, 6))}
    torch.testing.assert_close(terms(student, eager(1), config, longer), terms(student, eager(1), config, batch))


def test_dynamic_map_finds_the_same_layers_in_a_copy() -> None:
    batch = {"input_ids": Rows(2).ids, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    config = DistillationConfig(logits_weight=0.0, hidden_weight=1.0, layer_map="dynamic")
    model = bert()
    assert float(terms(model, model, config, batch)) == 0.0


def test_uniform_map_ends_at_the_last_layer() -> None:
    assert uniform_pairs(6, 12) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]
    assert uniform_pairs(2, 2) == [(0, 0), (1, 1)]
    assert uniform_pairs(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


# -- refused before step one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": ""}, "`distillation.teacher` must be a non-empty string, got ''"),
        ({"temperature": 0.0}, r"`distillation.temperature` must be in \(0, inf\), got 0\.0"),
        ({"logits_weight": -1}, r"`distillation.logits_weight` must be in \[0, inf\), got -1"),
        ({"logits_weight": 0.0}, "must be above 0, got 0 for all"),
        ({"layer_map": "random"}, "`distillation.layer_map` must be 'uniform', 'dynamic' or a list of pairs"),
        ({"layer_map": [[0, -1]]}, "list of pairs"),
        ({"layer_map": []}, "list of pairs"),
        ({"load_in_8bit": True}, "must be false for the teacher 'self'"),
        ({"temprature": 2.0}, "no key 'temprature'; did you mean 'temperature'"),
    ],
)
def test_distillation_that_cannot_be_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DistillationConfig.from_dict(options)


@pytest.mark.parametrize("options", [{}, {"teacher": "x", "layer_map": [[0, 1], [1, 3]], "temperature": 4.0}])
def test_distillation_config_round_trips(options: dict[str, Any]) -> None:
    config = DistillationConfig.from_dict(options)
    assert DistillationConfig.from_dict(config.to_dict()) == config
    assert config.to_dict() == options


@pytest.mark.parametrize(
    ("teacher", "distillation", "message"),
    [
        ({"num_labels": 3}, {}, "the teacher has num_labels=3 and the model num_labels=2"),
        ({"hidden_size": 64}, {"hidden_weight": 1.0}, "the teacher has hidden_size=64 and the model hidden_size=32"),
        ({}, {"hidden_weight": 1.0, "layer_map": [[2, 0]]}, r"pair \[2, 0\], but the student has layers 0 to 1"),
        ({}, {"attention_weight": 1.0}, 'load it with attn_implementation="eager"'),
    ],
)
def test_teacher_that_cannot_teach_this_model_is_an_error_when_the_trainer_is_made(
    teacher: dict[str, Any], distillation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = bert()
    other = BertForSequenceClassification(tiny.config(**{"num_labels": 2, **teacher}))
    with pytest.raises(RecipeError, match=message):
        taught_trainer(tmp_path, model, other, distillation=distillation)
    assert set(model.state_dict()) == set(bert().state_dict())  # no masks were left on it


def test_label_smoothing_with_a_teacher_is_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(RecipeError, match=r"distillation adds a term to the loss, but label_smoothing_factor=0\.1"):
        taught_trainer(tmp_path, model, label_smoothing_factor=0.1)
    assert set(model.state_dict()) == set(bert().state_dict())
    assert not model._forward_hooks


def test_trainer_with_a_loss_of_its_own_and_a_teacher_is_an_error_before_step_one(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"])

    callback = SparsityCallback(MOVEMENT, teacher="self")
    trainer = Own(bert(), arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    with pytest.raises(RecipeError, match="distillation adds a term to the loss, but the loss that this Trainer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_logits_of_another_shape_are_an_error_and_not_broadcast(tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
            return {"logits": torch.zeros(1, 2)}

    trainer = taught_trainer(tmp_path, bert(), Other())
    with pytest.raises(SparsityError, match=r"the teacher's logits have shape \(1, 2\) and the student's \(8, 2\)"):
        trainer.train()


# -- what the labels are ---------------------------------------------------------------------------------------------


class Tags(Rows):
    """Three labels for each example: independent classes, or numbers."""

    def __init__(self, numbers: bool = False) -> None:
        super().__init__()
        self.numbers = numbers

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        row["labels"] = row["input_ids"][:3].float() / 10 if self.numbers else (row["input_ids"][:3] % 2).float()
        return row


@pytest.mark.parametrize(
    ("problem_type", "numbers", "loss"),
    [
        (None, False, "sigmoid"),
        ("multi_label_classification", False, "sigmoid"),
        ("regression", True, "squared"),
    ],
)
def test_logits_are_compared_as_the_labels_are_meant(
    problem_type: str | None, numbers: bool, loss: str, tmp_path: Path
) -> None:
    """The first term with a teacher that adds 1 to each logit, which a softmax would not see."""

    def model() -> Any:
        torch.manual_seed(0)
        options = {} if problem_type is None else {"problem_type": problem_type}
        return BertForSequenceClassification(tiny.config(num_labels=3, **NO_DROPOUT, **options))

    teacher = model()
    torch.nn.init.ones_(teacher.classifier.bias)
    student = model()
    callback, student_inputs = SparsityCallback(LATE, teacher=teacher), Tags(numbers)
    options: dict[str, Any] = {"logging_steps": 1, "max_steps": 10, "per_device_train_batch_size": 64}
    trainer = Trainer(student, arguments(tmp_path, **options), train_dataset=student_inputs, callbacks=[callback])
    batch = {"input_ids": student_inputs.ids, "attention_mask": torch.ones_like(student_inputs.ids)}
    with torch.no_grad():
        logits = model().eval()(**batch).logits
    trainer.train()
    p, q = ((logits + extra).div(2.0).sigmoid() for extra in (1.0, 0.0))
    bernoulli = 4.0 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    expected = {"sigmoid": float(bernoulli), "squared": 1.0}[loss]
    assert logged(trainer, "distillation_kl")[0] == pytest.approx(expected, rel=1e-3)


# -- which teachers ---------------------------------------------------------------------------------------------------


def test_self_works_for_a_plain_module(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids: torch.Tensor, labels: Any = None, **_: Any) -> dict[str, torch.Tensor]:
            logits = self.head(torch.relu(self.layers[0](input_ids.float())))
            loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
            return {**loss, "logits": logits}

    trainer = taught_trainer(tmp_path, Plain(), config=SparsityConfig(sparsity=0.5, targets="layers.*", schedule=RAMP))
    trainer.train()
    assert logged(trainer, "distillation_kl")
    assert summarize(trainer.model).sparsity == pytest.approx(0.5, abs=0.02)


def test_teacher_folder_without_a_head_is_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    folder = str(tiny.save_bert(tmp_path / "base", head=False))
    with pytest.raises(RecipeError, match=r"the teacher \(BertModel\) has no head, so it returns no logits"):
        taught_trainer(tmp_path, bert(), folder)


def test_teacher_folder_that_lacks_weights_of_its_head_is_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    folder = tiny.save_bert(tmp_path / "base", head=False)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSequenceClassification"'))
    with pytest.raises(RecipeError, match=r"no weights for 2 parameters of BertForSequenceClassification"):
        taught_trainer(tmp_path, bert(), str(folder))
