"""A sparse model that is fine-tuned further stays sparse, and can be set free."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import RecipeError, SparsityConfig, sparsify, summarize
from hf_sparse.modeling.zero_preservation import free_zeros, keep_zeros
from tests.helpers.layers import one_layer, two_layers
from tests.helpers.training import RAMP, Rows, arguments, bert, sparse_trainer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"weight_decay": 0.1},
    "sgd": {"optim_args": "momentum=0.9"},
    "adafactor": {},
    "rmsprop": {},
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    sparsify(bert(), SparsityConfig(sparsity=0.9)).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def fine_tune(model: Any, folder: Path, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model, arguments(folder, max_steps=5, **options), train_dataset=Rows()).train()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(before[name], model.state_dict()[name])  # what is kept has moved


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_loaded_model_keeps_its_zeros_in_a_plain_trainer(optim: str, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    zeros = {name: tensor == 0 for name, tensor in model.named_parameters()}
    targeted = [weight.name for weight in summarize(model).weights]
    fine_tune(model, tmp_path / "runs", optim=optim, **OPTIMIZERS[optim])
    for name, weight in model.named_parameters():
        if name in targeted:
            assert torch.equal(weight == 0, zeros[name]), name
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert summarize(again).nonzeros == summarize(model).nonzeros


LIVES: dict[str, dict[str, Any]] = {
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "bf16 autocast": {"bf16": True},
    "activation checkpointing": {"activation_checkpointing": True},
    "clipping, warm-up, label smoothing": {"max_grad_norm": 0.1, "warmup_steps": 2, "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("life", LIVES)
def test_zeros_stay_whatever_the_trainer_is_told(life: str, dtype: torch.dtype, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed, dtype=dtype)
    zeros = {weight.name: model.get_parameter(weight.name) == 0 for weight in summarize(model).weights}
    fine_tune(model, tmp_path / "runs", weight_decay=0.1, learning_rate=0.01, **LIVES[life])
    for name, removed in zeros.items():
        assert torch.all(model.get_parameter(name)[removed] == 0), name


def test_weights_are_sent_to_another_process_without_a_warning_for_each() -> None:
    (layer,) = one_layer([[0.0, 1.0]])
    keep_zeros([layer])
    assert layer.weight._backward_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.utils.hooks.warn_if_has_hooks(layer.weight)  # what torch.multiprocessing calls for each tensor


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_their_zeros(how: str, packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    fine_tune(model, tmp_path / "first")  # its parameters have their hooks now; the copy's have none
    twin = COPIES[how](model)
    expected = summarize(twin).nonzeros
    fine_tune(twin, tmp_path / "second")
    assert summarize(twin).nonzeros == expected
    twin.save_pretrained(tmp_path / "saved")  # itself, not the model it is a copy of
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=twin.dtype)
    assert torch.equal(saved.state_dict()["classifier.weight"], twin.state_dict()["classifier.weight"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_keeps_its_zeros(backend: str) -> None:
    model = sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        compiled(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert summarize(model).sparsity == pytest.approx(0.5, abs=0.01)


class Encoder(nn.Module):
    """An encoder of torch, whose attention reads `out_proj.weight` and does not call the layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.blocks(inputs)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, lambda model: model], ids=["deepcopy", "pickle", "itself"])
def test_weights_of_layers_that_are_never_called_keep_their_zeros(how: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = how(sparsify(Encoder(), SparsityConfig(targets=["*"], sparsity=0.75)))
    expected = summarize(model)
    assert any("out_proj" in weight.name for weight in expected.weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(2, 5, 16)).square().sum().backward()
        optimizer.step()
        state = optimizer.state[model.blocks.layers[0].self_attn.out_proj.weight]
        optimizer.zero_grad()
    assert summarize(model) == expected
    assert int((state["exp_avg"] == 0).sum()) == 192  # the optimizer knows nothing of the zeros


def test_model_and_optimizer_copied_in_the_middle_of_training_keep_zeros() -> None:
    model = sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(4):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model, optimizer = copy.deepcopy((model, optimizer))
    assert summarize(model).sparsity == 0.5


def test_averaged_models_keep_zeros() -> None:
    model = sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    averages = [
        torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=function)
        for function in (None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    ]
    optimizer = torch.optim.Muon([model[0].weight, model[2].weight], lr=0.1)
    for _ in range(4):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        assert summarize(average).sparsity == 0.5


def test_norm_that_gradients_are_clipped_by_is_without_those_of_zeros() -> None:
    model = sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    inputs = torch.randn(4, 16)
    model(inputs).square().sum().backward()
    gradients = [parameter.grad * (parameter != 0) for parameter in (model[0].weight, model[2].weight)]
    gradients += [model[0].bias.grad, model[2].bias.grad]
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(expected.item())


def test_gradients_of_gradients_pass_the_guard() -> None:
    model = sparsify(one_layer([[0.5, 3.0]]), SparsityConfig(targets="*", sparsity=0.5))
    inputs = torch.tensor([[2.0, 5.0]])
    (gradient,) = torch.autograd.grad(model(inputs).pow(3).sum(), model[0].weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), model[0].weight)
    assert gradient.tolist() == [[0.0, 3 * 15.0**2 * 5]]
    assert second.tolist() == [[0.0, 6 * 15.0 * 5 * 5]]


def test_zeros_of_a_diverging_training_stay_positive_zeros() -> None:
    model = sparsify(one_layer([[0.5, -3.0], [0.25, 4.0]]), SparsityConfig(targets="*", sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    for _ in range(2):
        model(torch.full((1, 2), float("inf"))).sum().backward()
        optimizer.step()
    weight = model[0].weight.detach()
    assert weight[:, 0].tolist() == [0.0, 0.0]
    assert not torch.signbit(weight[:, 0]).any()
    assert not torch.isfinite(weight[:, 1]).any()  # the rest has diverged


def test_weight_that_is_computed_from_others_is_refused_in_training() -> None:
    model = sparsify(two_layers(), SparsityConfig(targets="*", sparsity=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model[0])
    with pytest.raises(RecipeError, match="not a parameter but a tensor computed from others"):
        model(torch.randn(4, 16))
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 16))


def test_model_that_was_pruned_keeps_its_zeros_in_the_next_run(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path / "prune")
    trainer.train()
    expected = summarize(trainer.model).nonzeros
    fine_tune(trainer.model, tmp_path / "on")
    assert summarize(trainer.model).nonzeros == expected


def test_dequantized_model_is_free(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    fine_tune(model, tmp_path / "kept")
    model.dequantize()
    fine_tune(model, tmp_path / "free")
    assert summarize(model).sparsity < 0.01


def test_pruning_further_is_not_held_back_by_the_zeros(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    config = SparsityConfig(sparsity=0.5, scorer="movement", schedule=RAMP)
    sparse_trainer(tmp_path, config, model).train()
    # Weights that were zero in the file have trained: half of all are kept now, not a tenth.
    assert summarize(model).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("loaded", [False, True])
def test_zeros_that_something_else_than_an_optimizer_filled_are_named_at_save(
    loaded: bool, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed) if loaded else sparsify(
        bert(), SparsityConfig(sparsity=0.9)
    )  # fmt: skip
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "as it was")
    fine_tune(model, tmp_path / "runs")
    model.save_pretrained(tmp_path / "trained")
    assert "overwritten" not in caplog.text
    name = "bert.encoder.layer.0.output.dense.weight"
    zeros = int((model.get_parameter(name) == 0).sum())
    for each in (model, twin):
        with torch.no_grad():
            each.get_parameter(name).add_(1e-3)
        caplog.clear()
        for format in ("packed", "dense"):  # noqa: A001  the word that save_pretrained has
            each.save_pretrained(tmp_path / "written", format=format)
            assert f"{zeros} zeros of 1 sparse weights (first: {name}) were overwritten" in caplog.text
    sparsify(model, SparsityConfig(sparsity=0.9))
    caplog.clear()
    model.save_pretrained(tmp_path / "again")
    assert "overwritten" not in caplog.text


def test_a_state_dict_brings_its_own_zeros() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
    keep_zeros([layer])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(3)).sum().backward()
    layer.load_state_dict({"weight": torch.tensor([[0.0, 2.0, 0.0]])})
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[0.0, 0.0, 0.0]]
    layer.load_state_dict({"weight": torch.tensor([[0.0, 2.0, 1.0]])})
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert layer.weight.tolist() == [[0.0, pytest.approx(1.9), pytest.approx(0.9)]]
    free_zeros([layer])
    assert not layer._load_state_dict_post_hooks
