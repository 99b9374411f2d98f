"""What the callback refuses before the first step, or says."""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import Trainer

from hf_sparse import RecipeError, SparsityCallback, SparsityConfig, SparsityError, sparsify, summarize
from tests.helpers.ranks import one_process
from tests.helpers.training import RAMP, Rows, arguments, bert, sparse_trainer


def test_best_model_without_an_evaluation_at_the_final_sparsity_is_an_error_before_training(tmp_path: Path) -> None:
    trainer = sparse_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        eval_delay=50,
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"holds from step 12 of 20 on, but eval_delay=50 .* Lower eval_delay"):
        trainer.train()
    assert trainer.state.global_step == 0


# -- what it refuses before step one ---------------------------------------------------------------------------------

SOFT = SparsityConfig(sparsity=0.5, scorer="soft_movement", schedule=RAMP)


def test_label_smoothing_with_a_loss_term_is_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'soft_movement' adds a term to the loss, but label_smoothing_factor=0.1"):
        sparse_trainer(tmp_path, SOFT, label_smoothing_factor=0.1)


def test_label_smoothing_is_fine_without_a_loss_term(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, label_smoothing_factor=0.1)
    trainer.train()
    assert summarize(trainer.model).sparsity == pytest.approx(0.9, abs=1e-3)


def test_compute_loss_func_with_a_loss_term_is_an_error_before_step_one(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    trainer = sparse_trainer(tmp_path, SOFT, trainer_options={"compute_loss_func": own})
    with pytest.raises(RecipeError, match="compute_loss_func replaces the model's own loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_trainer_that_ignores_the_loss_of_the_model_is_an_error_before_step_one(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            return torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])

    model = bert()
    before = copy.deepcopy(model.state_dict())
    trainer = Own(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[SparsityCallback(SOFT)])
    with pytest.raises(RecipeError, match="does not contain the `loss` of the model's outputs"):
        trainer.train()
    assert torch.equal(before["classifier.weight"], model.classifier.weight)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "cubic", "begin": 0.1, "end": 0.12}, r"less than one of its 20 steps"),
        (
            {"name": "linear", "begin": 0.2, "end": 0.6, "every": 9},
            r"every 9 steps, but its ramp has 8 of the 20 steps",
        ),
    ],
)
def test_schedule_that_this_run_cannot_follow_is_an_error_before_step_one(
    schedule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5, schedule=schedule))
    with pytest.raises(RecipeError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_targets_that_match_nothing_are_an_error_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'\*.no_such' matches no layer .*bert.encoder.layer.\*.output.dense"):
        sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5, targets="*.no_such"))


def test_second_run_with_the_same_callback_is_an_error(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path)
    trainer.train()
    with pytest.raises(RecipeError, match="its masks are permanent"):
        trainer.train()


def test_model_that_is_quantized_is_refused() -> None:
    class Quantizer:
        quantization_config = type("Config", (), {"quant_method": "bitsandbytes"})

    model = bert()
    model.hf_quantizer = Quantizer()
    with pytest.raises(RecipeError, match=r"the model is quantized \(bitsandbytes\)"):
        sparsify(model, SparsityConfig(sparsity=0.5))


def test_diverged_training_is_an_error_not_a_wrong_mask(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(SparsityError, match="NaN among the scores"):
        trainer.train()


GATHERED = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}


@pytest.mark.parametrize(
    ("said", "stage", "settings", "scorer"),
    [
        (
            "ZeRO-3 the Trainer saves a model only if stage3_gather_16bit_weights_on_model_save is true",
            3,
            {},
            "magnitude",
        ),
        ("'movement' does not work with DeepSpeed ZeRO-3.*Use scorer 'magnitude', or ZeRO-2", 3, GATHERED, "movement"),
        (None, 3, GATHERED, "magnitude"),
        ("`warmup` does not work with DeepSpeed", 2, {}, {"name": "movement", "warmup": 0.1}),
        ("gradients does not work with DeepSpeed in fp16", 2, {"fp16": {"enabled": True}}, "taylor"),
        (None, 2, {"fp16": {"enabled": False}}, "taylor"),
        (None, 1, {}, "movement"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_before_the_first_step(
    tmp_path: Path, said: str | None, stage: int, settings: dict[str, Any], scorer: Any
) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.5, scorer=scorer))
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=settings)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with contextlib.nullcontext() if said is None else pytest.raises(RecipeError, match=said):
        trainer.create_optimizer()


FSDP2 = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "StateDictType.FULL_STATE_DICT"}


MIXED = "one data type, but weights and scores are bfloat16 and float32"


@pytest.mark.parametrize(
    ("said", "settings", "method"),
    [
        (r"fsdp_config version=1: .*Use version 2", {"fsdp_version": 1}, {}),
        (MIXED, {}, {"scorer": {"name": "movement", "dtype": "bfloat16"}}),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_the_first_step(
    tmp_path: Path, said: str, settings: dict[str, Any], method: dict[str, Any]
) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(**{"sparsity": 0.5, "scorer": "movement", **method}))
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**FSDP2, **settings})))
    with pytest.raises(RecipeError, match=said):
        trainer.create_optimizer()


def test_fsdp_that_does_not_happen_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = sparse_trainer(tmp_path)
    trainer.args.fsdp = True
    with caplog.at_level(logging.WARNING):
        trainer.create_optimizer()
    assert "the run is plain DDP" in caplog.text


def test_masks_on_weights_that_are_sharded_already_are_refused(tmp_path: Path) -> None:
    model = bert()
    layer = model.bert.encoder.layer[0].output.dense
    with one_process():
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(RecipeError, match=r"layer\.0\.output\.dense\.weight' is sharded already.*masks on first"):
            sparse_trainer(tmp_path, model=model)
