"""Inputs of a few tokens: what is timed at them, and that layers which would lose compute with dense weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.errors import BackendError
from hf_sparse.kernels import LibraryStatus
from hf_sparse.profiling.timer import Run
from hf_sparse.runtime import SpeedTable
from hf_sparse.runtime.autotune import Measurement, Trial
from hf_sparse.runtime.memory import bytes_of
from hf_sparse.runtime.packed_linear import PackedLinear, is_short
from hf_sparse.runtime.planner import DECODING_TOKENS, SHORT_TOKENS, TOKENS, dense_up_to
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import answers, sparse, sparse_decoder
from tests.helpers.structures import batch


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None, bitmask=None)


class SlowWhereShort:
    """A clock: packed takes half of the time of dense, but twice of it up to some token count, for some kernels."""

    def __init__(self, limit: int, *kinds: str) -> None:
        self.limit, self.kinds = limit, kinds
        self.timed: list[Trial] = []

    def __call__(self, trial: Trial, dense: Run, packed: Run) -> Measurement:
        self.timed.append(trial)
        slow = trial.tokens <= self.limit and (not self.kinds or trial.kind in self.kinds)
        return Measurement(1.0, 2.0, 0.5) if slow else Measurement(1.0, 0.5, 2.0)


def converted(model: nn.Module, folder: Path, clock: SlowWhereShort, **options: Any) -> Any:
    return to_runtime(model, "auto", table=SpeedTable(folder / "runtime.json", clock), **options)


@pytest.mark.parametrize(
    ("slow", "expected"),
    [((), 0), ((1,), 1), ((1, 2, 4), 6), ((3,), 3), ((9,), 14), ((15,), 16), ((1, 15), 16), (SHORT_TOKENS, 16)],
)
def test_limit_reaches_to_the_next_count_that_gains(slow: tuple[int, ...], expected: int) -> None:
    measured = {n: Measurement(1.0, 1.2 if n in slow else 0.5, 1.0) for n in SHORT_TOKENS}
    assert dense_up_to(measured, TOKENS[0]) == expected


def test_as_fast_as_dense_is_not_enough() -> None:
    assert dense_up_to({1: Measurement(1.0, 0.99, 1.0), 4: Measurement(1.0, 0.9, 1.0)}, 17) == 3
    assert dense_up_to({}, 17) == 0


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5"])
def test_short_inputs_take_the_dense_weight_and_others_the_packed(family: str, tmp_path: Path) -> None:
    model, inputs = sparse(family), batch(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, own in model.named_parameters() if own.requires_grad}
    long = {name: torch.cat([value] * 5) for name, value in inputs.items()}
    short = cut(inputs, 3)
    dense = copy.deepcopy(model)
    report = converted(model, tmp_path, SlowWhereShort(9))
    encoder = [one for one in report.sparse if "decoder" not in one.name]
    assert encoder
    assert {one.dense_up_to for one in encoder} == {14}
    assert all(one.bytes > one.dense_bytes and "dense up to 14 tokens" in str(report) for one in encoder)
    for some in (short, long):
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
            torch.testing.assert_close(answers(each, some), answers(dense, some), atol=1e-5, rtol=1e-5)
    to_dense_runtime(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name for name, own in model.named_parameters() if own.requires_grad} == trained


def cut(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return the beginning of the first sequence."""
    return {name: value[:1, :length] if value.dim() > 1 else value[:1] for name, value in inputs.items()}


def layer_inputs(tokens: int, layer: PackedLinear) -> Tensor:
    return torch.randn(1, tokens, layer.in_features)


def test_memory_counts_the_dense_weights_that_are_kept(tmp_path: Path) -> None:
    model, decoder = sparse("bert"), sparse_decoder("llama")
    before = bytes_of(model), bytes_of(decoder)
    reports = converted(model, tmp_path, SlowWhereShort(9)), to_runtime(decoder, "bitmask-int8", keep_dense=True)
    for each, bytes_before, report in zip((model, decoder), before, reports, strict=True):
        more = report.bytes - report.dense_bytes  # shares of a joint weight are rounded
        assert more > 0
        assert bytes_of(each) - bytes_before == pytest.approx(more, abs=len(report.layers))


def test_short_inputs_are_bit_for_bit_those_of_dense(tmp_path: Path) -> None:
    model = sparse("bert")
    dense = copy.deepcopy(model)
    converted(model, tmp_path, SlowWhereShort(9))
    short = cut(batch("bert"), 14)
    assert short["input_ids"].numel() <= 14
    assert torch.equal(answers(model, short), answers(dense, short)), "the very operations of the dense model"
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            plain = dense.get_submodule(name)
            for tokens in (1, 14):
                x = layer_inputs(tokens, module)
                assert torch.equal(module(x), plain(x))
            assert is_short(layer_inputs(14, module), module.short)
            assert not is_short(layer_inputs(15, module), module.short)


def test_short_inputs_are_refused_as_long_ones_are(tmp_path: Path) -> None:
    model = sparse("bert")
    converted(model, tmp_path, SlowWhereShort(9))
    layer: Any = next(module for module in model.modules() if isinstance(module, PackedLinear))
    for tokens in (1, 200):
        x = layer_inputs(tokens, layer)
        with pytest.raises(BackendError, match=r"in float32 on the CPU, got an input in torch\.float64"):
            layer(x.double())
        with pytest.raises(BackendError, match="computes no gradients"):
            layer(x.clone().requires_grad_())
        layer.train()
        with pytest.raises(BackendError, match="is in training mode"):
            layer(x)
        layer.eval()


def test_short_inputs_have_the_type_of_long_ones_under_autocast(tmp_path: Path) -> None:
    model = sparse("bert")
    converted(model, tmp_path, SlowWhereShort(9))
    layer: Any = next(module for module in model.modules() if isinstance(module, PackedLinear))
    with torch.autocast("cpu", torch.bfloat16):
        assert {layer(layer_inputs(tokens, layer)).dtype for tokens in (1, 200)} == {torch.float32}


def test_sub_blocks_that_gain_at_every_length_keep_no_dense_weight(tmp_path: Path) -> None:
    clock = SlowWhereShort(9, "sparse_ffn")
    report = converted(sparse("bert"), tmp_path, clock)
    limits = {one.kernel: one.dense_up_to for one in report.sparse}
    assert limits["sparse_ffn"] == 14
    assert limits["sparse_qkv"] == limits["sparse_linear"] == 0
    assert {trial.tokens for trial in clock.timed} == {*SHORT_TOKENS, *TOKENS}


def test_requested_token_counts_are_all_that_is_timed(tmp_path: Path) -> None:
    clock = SlowWhereShort(9)
    report = converted(sparse("bert"), tmp_path, clock, tokens=(32, 64))
    assert {trial.tokens for trial in clock.timed} == {32, 64}
    assert {one.dense_up_to for one in report.sparse} == {0}


def test_layers_that_stay_dense_are_not_timed_at_short_inputs(tmp_path: Path) -> None:
    clock = SlowWhereShort(5000)
    report = converted(sparse("bert"), tmp_path, clock)
    assert not report.sparse
    assert {trial.tokens for trial in clock.timed} == set(TOKENS)


def test_decoder_is_timed_at_its_steps_as_before(tmp_path: Path) -> None:
    clock = SlowWhereShort(0)
    model = sparse("t5")
    report = converted(model, tmp_path, clock)
    decoder = [one for one in report.sparse if one.name.startswith("decoder.")]
    assert {one.dense_up_to for one in decoder} == {0}
    assert set(DECODING_TOKENS) <= {count for one in decoder for count in one.gains}


def test_gradients_and_training_are_refused_at_any_length(tmp_path: Path) -> None:
    model = sparse("bert")
    converted(model, tmp_path, SlowWhereShort(9))
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    x = layer_inputs(2, layer)
    assert not layer(x).requires_grad
    with pytest.raises(Exception, match="computes no gradients"):
        layer(x.requires_grad_())
    model.train()
    with pytest.raises(Exception, match="training mode"):
        layer(x.detach())
