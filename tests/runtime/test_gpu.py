"""What `to_runtime` chooses for a model on a GPU, and how it comes back: on the CPU, with the device made up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_sparse import BackendError, SparsityConfig, compact, sparsify, to_dense_runtime, to_runtime
from hf_sparse.kernels.gpu import block_sparse
from hf_sparse.kernels.gpu.semi_structured import SemiStructuredLinear, pack_semi_structured
from hf_sparse.runtime import SpeedTable, gpu, is_runtime
from hf_sparse.runtime.autotune import Measurement, Trial


class Clock:
    """Says what it is told, by kernel, and checks that both sides compute the same."""

    def __init__(self, **gains: float) -> None:
        self.gains, self.asked = gains, list[Trial]()

    def __call__(self, trial: Trial, dense: Any, packed: Any) -> Measurement:
        self.asked.append(trial)
        torch.testing.assert_close(packed(), dense(), atol=2e-2, rtol=2e-2)
        gain = self.gains.get(trial.kind.split()[0], 0.5)
        return Measurement(gain, 1.0, gain)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a GPU of compute capability 8.0, whose kernels are the plain defaults."""
    made = lambda layer, *_: SemiStructuredLinear.from_packed(pack_semi_structured(layer.weight), layer.bias)  # noqa: E731
    monkeypatch.setattr(gpu, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(SemiStructuredLinear, "from_linear", made)
    monkeypatch.setattr(block_sparse, "has_triton", lambda: True)
    monkeypatch.setattr(block_sparse, "interprets", lambda: False)


def model_of(pattern: Any, dtype: torch.dtype = torch.float16) -> Any:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to(dtype).eval()
    sparsify(model, SparsityConfig(targets="*", sparsity=0.5, pattern=pattern))
    return model


def table(path: Path, clock: Clock) -> SpeedTable:
    return SpeedTable(path / "t.json", clock)


BLOCKS = {"name": "block", "rows": 32, "cols": 32}


@pytest.mark.parametrize(("pattern", "kernel"), [("2:4", "semi_structured"), (BLOCKS, "block_sparse")])
@pytest.mark.usefixtures("ampere")
def test_each_pattern_gets_its_kernel_and_the_way_back_changes_no_bit(
    pattern: Any, kernel: str, tmp_path: Path
) -> None:
    model, x = model_of(pattern).requires_grad_(True), torch.randn(4, 128, dtype=torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = list(model.parameters())
    expected = model(x)
    report = to_runtime(model, table=table(tmp_path, Clock(**{kernel: 1.5})))
    assert [layer.kernel for layer in report.sparse] == [kernel, kernel]
    assert is_runtime(model)
    assert all(layer.bytes < 0.65 * layer.dense_bytes for layer in report.sparse)
    torch.testing.assert_close(model(x), expected.detach(), atol=2e-2, rtol=2e-2)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected.detach(), atol=2e-2, rtol=2e-2)
    to_dense_runtime(model)
    assert [id(one) for one in model.parameters()] == [id(one) for one in own]
    assert all(one.requires_grad for one in own)
    assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("ampere")
def test_dense_stays_where_it_wins_and_numbers_of_tokens_count(tmp_path: Path) -> None:
    clock = Clock(semi_structured=1.01)
    report = to_runtime(model_of("2:4"), tokens=(7, 9), table=table(tmp_path, clock))
    assert not report.sparse
    assert all("semi_structured is 1.01x at 7 tokens" in str(layer.reason) for layer in report.layers)
    assert {trial.tokens for trial in clock.asked} == {7, 9}
    assert all(trial.device for trial in clock.asked)


@pytest.mark.parametrize(
    ("pattern", "dtype", "said"),
    [
        ("2:4", torch.float32, "keeps one of two"),
        ("element", torch.float16, "fewer than 40% of its blocks"),
        (BLOCKS, torch.float64, "fp16, bf16 and fp32"),
    ],
)
@pytest.mark.usefixtures("ampere")
def test_refusals_are_in_words(pattern: Any, dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    report = to_runtime(model_of(pattern, dtype), table=table(tmp_path, Clock()))
    assert not report.sparse
    assert all(said in str(layer.reason) for layer in report.layers), report.layers[0].reason


def test_without_a_device_every_layer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_on_gpu", lambda _: True)
    report = to_runtime(model_of("2:4"), table=table(tmp_path, Clock()))
    assert all("needs a CUDA device" in str(layer.reason) for layer in report.layers)


@pytest.mark.usefixtures("ampere")
def test_runtime_form_of_a_gpu_refuses_what_that_of_the_cpu_does(tmp_path: Path) -> None:
    model = model_of("2:4")
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda *_: seen.append(_[2]))
    report = to_runtime(model, table=table(tmp_path, Clock(semi_structured=2.0)))
    assert [layer.kernel for layer in report.layers] == ["semi_structured", "dense"]
    assert "hooks" in str(report.layers[1].reason)
    x = torch.randn(2, 128, dtype=torch.float16)
    model(x)
    assert len(seen) == 1
    for change in (lambda: model.to(torch.float32), lambda: to_runtime(model), lambda: compact(model)):
        with pytest.raises(BackendError, match="to_dense_runtime"):
            change()
    with pytest.raises(RuntimeError, match="packed for inference"):
        model.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(BackendError, match="to_dense_runtime"):
        model.train()(x)


@pytest.mark.usefixtures("ampere")
def test_failure_half_way_brings_a_model_back(tmp_path: Path) -> None:
    model, clock = model_of("2:4").requires_grad_(True), Clock(semi_structured=2.0)
    before = list(model)

    def failing(trial: Trial, dense: Any, packed: Any) -> Measurement:
        if trial.shapes[0] == (128, 256):
            raise KeyboardInterrupt
        return clock(trial, dense, packed)

    with pytest.raises(KeyboardInterrupt):
        to_runtime(model, table=SpeedTable(tmp_path / "t.json", failing))
    assert not is_runtime(model)
    assert all(now is then for now, then in zip(model, before, strict=True))
    assert all(own.requires_grad for own in model.parameters())


@pytest.mark.gpu
def test_runtime_form_on_a_gpu_computes_the_same(tmp_path: Path) -> None:
    for pattern in ("2:4", BLOCKS):
        model, x = model_of(pattern).cuda(), torch.randn(64, 128, dtype=torch.float16, device="cuda")
        expected = model(x)
        to_runtime(model, table=table(tmp_path, Clock(semi_structured=2.0, block_sparse=2.0)))
        torch.testing.assert_close(model(x), expected, atol=2e-2, rtol=2e-2)
        to_dense_runtime(model)
        assert torch.equal(model(x), expected)
