"""Zeros stay zero with every optimizer of torch and of transformers, and the other weights train as ever."""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_sparse import SparsityError
from hf_sparse.modeling import zero_preservation
from hf_sparse.modeling.zero_preservation import free_zeros, keep_zeros
from tests.helpers.training import arguments

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
FLAGS = ("foreach", "fused", "amsgrad", "maximize", "nesterov", "centered", "decoupled_weight_decay")
MIXES = {"Muon"}  # its update fills every entry, whatever the gradient is


def variants() -> Iterator[Any]:
    """Yield each optimizer with weight decay and momentum, alone and with each of its flags."""
    for name, kind in OPTIMIZERS.items():
        accepted = inspect.signature(kind).parameters
        decay = {key: value for key, value in {"weight_decay": 0.1, "momentum": 0.9}.items() if key in accepted}
        yield pytest.param(kind, decay, id=name)
        for flag in FLAGS:
            if flag in accepted and not (name == "Muon" and flag == "nesterov"):  # on by default
                # A loss without upper bound: full quasi-Newton steps up end in NaN (torch >= 2.14 has it).
                small = {"lr": 0.01} if (name, flag) == ("LBFGS", "maximize") else {}
                yield pytest.param(kind, {**decay, **small, flag: True}, id=f"{name}-{flag}")


class Used(nn.Module):
    """Two weights: one is used by calling its layer, one without."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.called, self.read = nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)
        for layer in (self.called, self.read):
            values = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data = values * (torch.rand(values.shape, generator=generator) < 0.4)
            layer.weight.data[0, 0], layer.weight.data[1, 1] = 0.0, 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(self.called(inputs).tanh(), self.read.weight)

    @property
    def weights(self) -> list[Tensor]:
        return [self.called.weight, self.read.weight]


def train(
    model: Used, optimizer: torch.optim.Optimizer, steps: int = 4, after: Callable[[], None] | None = None
) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs, wanted = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (model(inputs) - wanted).square().mean()  # noqa: B023
            value.backward()
            if isinstance(optimizer, torch.optim.SparseAdam):
                for weight in model.weights:
                    assert weight.grad is not None
                    weight.grad = weight.grad.to_sparse()
            return value

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
        if after is not None:
            after()


@pytest.mark.parametrize(("kind", "options"), list(variants()))
def test_torch_optimizer_keeps_zeros_and_trains_the_rest(kind: Any, options: dict[str, Any]) -> None:
    model, expected = Used(), Used()
    zeros = [weight == 0 for weight in model.weights]
    before = [weight.detach().clone() for weight in model.weights]
    keep_zeros([model.called, model.read])
    train(model, kind(model.parameters(), **options))
    for weight, old, removed in zip(model.weights, before, zeros, strict=True):
        assert torch.equal(weight == 0, removed)
        assert not torch.signbit(weight[removed]).any()
        assert (weight != old)[~removed].float().mean() > 0.9
    # What the gradient hook alone gives, which is all that an elementwise optimizer needs.
    for weight, removed in zip(expected.weights, zeros, strict=True):
        weight.register_hook(lambda gradient, removed=removed: gradient.masked_fill(removed, 0.0))

    def mask() -> None:
        for weight, removed in zip(expected.weights, zeros, strict=True):
            weight.data.masked_fill_(removed, 0.0)

    train(expected, kind(expected.parameters(), **options), after=mask if kind.__name__ in MIXES else None)
    for weight, other in zip(model.weights, expected.weights, strict=True):
        assert torch.equal(weight, other)


def built(name: str, model: nn.Module, folder: Path) -> torch.optim.Optimizer:
    """Return the optimizer that the Trainer makes of `TrainingArguments.optim`."""
    trainer = Trainer(model, arguments(folder, optim=name, optim_target_modules=["called", "read"], weight_decay=0.1))
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    return optimizer


BUILT_HERE = {"adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_optimizer_of_transformers_keeps_zeros(name: str, tmp_path: Path) -> None:
    model = Used()
    zeros = [weight == 0 for weight in model.weights]
    before = [weight.detach().clone() for weight in model.weights]
    keep_zeros([model.called, model.read])
    try:
        optimizer = built(name, model, tmp_path)
    except (ImportError, ValueError) as error:  # its package is not installed
        assert name not in BUILT_HERE
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    train(model, optimizer)
    for weight, old, removed in zip(model.weights, before, zeros, strict=True):
        assert torch.equal(weight == 0, removed)
        assert not torch.equal(weight, old)


class Rotating(torch.optim.Optimizer):
    """Mix all entries of a weight: the worst that an optimizer can do to zeros."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            parameter.data = parameter.data.roll(1, 0) - 0.1  # the storage is another one, too


class Nested(Rotating):
    """Call the step of its base class, and change the weights before and after that."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
                parameter += 1
            super().step()
            for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
                parameter += 1


class Failing(Rotating):
    """Raise once in the middle of a step."""

    failed = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if not self.failed:
            self.failed = True
            raise FloatingPointError


@pytest.mark.parametrize("kind", [Rotating, Nested])
def test_optimizer_that_moves_every_entry_keeps_zeros(kind: Any) -> None:
    Rotating(Used().parameters())  # so that the step of the base class has its hooks too
    model = Used()
    zeros = [weight == 0 for weight in model.weights]
    keep_zeros([model.called, model.read])
    optimizer = kind(model.parameters())
    train(model, optimizer)
    for weight, removed in zip(model.weights, zeros, strict=True):
        assert torch.equal(weight == 0, removed)


def test_step_that_raised_does_not_shift_what_the_next_one_restores() -> None:
    model = Used()
    keep_zeros([model.called])
    optimizer = Failing([model.called.weight])
    with pytest.raises(FloatingPointError):
        optimizer.step()
    with torch.no_grad():
        model.called.weight.fill_(1.0)
        model.called.weight[0] = 0.0
    for _ in range(3):
        optimizer.step()
    assert torch.all(model.called.weight[0] == 0)
    assert torch.all(model.called.weight[1:] != 0)


def test_optimizer_whose_momentum_is_from_before_the_guard_keeps_zeros() -> None:
    model = Used()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    with torch.no_grad():
        for weight in model.weights:
            weight[0] = 0.0
    keep_zeros([model.called, model.read])
    train(model, optimizer)
    for weight in model.weights:
        assert torch.all(weight[0] == 0)
        assert torch.all(weight[1:] != 0)


def test_step_in_backward_keeps_zeros() -> None:
    model = Used()
    zeros = [weight == 0 for weight in model.weights]
    keep_zeros([model.called, model.read])
    optimizers = {weight: torch.optim.Muon([weight], lr=0.1) for weight in model.weights}
    for weight in model.weights:
        weight.register_post_accumulate_grad_hook(lambda weight: optimizers[weight].step())
    for _ in range(3):
        model(torch.randn(5, 8)).square().mean().backward()
    for weight, removed in zip(model.weights, zeros, strict=True):
        assert torch.equal(weight == 0, removed)


class Unhooked:
    """Train without `torch.optim.Optimizer`, as LOMO and hand-written loops do."""

    def __init__(self, model: Used, mixes: bool) -> None:
        self.model, self.mixes = model, mixes

    def zero_grad(self) -> None:
        for weight in self.model.weights:
            weight.grad = None

    def step(self) -> None:
        for weight in self.model.weights:
            assert weight.grad is not None
            weight.data -= 0.1 * (weight.grad + self.mixes)


def test_hand_written_descent_keeps_zeros() -> None:
    model: Any = Used()
    zeros = [weight == 0 for weight in model.weights]
    keep_zeros([model.called, model.read])
    train(model, Unhooked(model, mixes=False))  # type: ignore[arg-type]
    for weight, removed in zip(model.weights, zeros, strict=True):
        assert torch.equal(weight == 0, removed)


def test_optimizer_that_cannot_be_covered_is_refused_after_its_first_step() -> None:
    model = Used()
    keep_zeros([model.called, model.read])
    with pytest.raises(SparsityError, match=r"zeros of a sparse weight of shape \(\d, \d\) were filled"):
        train(model, Unhooked(model, mixes=True), steps=2)  # type: ignore[arg-type]


def test_zeros_that_are_filled_on_purpose_after_a_step_are_no_error() -> None:
    model = Used()
    keep_zeros([model.called, model.read])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    with torch.no_grad():
        model.called.weight += 1.0  # as `load_state_dict` of another model
    train(model, optimizer)
    assert torch.all(model.called.weight != 0)


def test_step_that_a_loss_scaler_skips_changes_nothing() -> None:
    model = Used()
    keep_zeros([model.called, model.read])
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        before = [weight.detach().clone() for weight in model.weights]
        scaler.scale(model(torch.ones(2, 8)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for weight, old in zip(model.weights, before, strict=True):
            assert torch.equal(weight == 0, old == 0)
            assert torch.equal(weight, old) == (factor != 1.0)


def installed() -> tuple[int, int]:
    module: Any = sys.modules["torch.optim.optimizer"]
    return len(module._global_optimizer_pre_hooks), len(module._global_optimizer_post_hooks)


def test_optimizers_have_hooks_only_while_something_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Models of other tests may be alive.
    monkeypatch.setattr(zero_preservation, "_guarded", weakref.WeakSet())
    monkeypatch.setattr(zero_preservation, "_step_hooks", zero_preservation._StepHooks())
    before, after, model = installed(), [], Used()
    keep_zeros([model.called])
    keep_zeros([model.read])
    after.append(installed())
    free_zeros([model.called])
    after.append(installed())
    free_zeros([model.read])
    assert after == [(before[0] + 1, before[1] + 1)] * 2
    assert installed() == before


def test_freed_weights_train_without_any_hook() -> None:
    model = Used()
    keep_zeros([model.called, model.read])
    free_zeros([model.called, model.read])
    free_zeros([model.called])  # a second time does nothing
    for layer in (model.called, model.read):
        assert not layer._forward_pre_hooks
        assert not layer.weight._backward_hooks
    train(model, torch.optim.Muon(model.parameters(), lr=0.1))
    assert all(bool((weight != 0).all()) for weight in model.weights)
