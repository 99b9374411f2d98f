"""Query, key and value as one matmul, and gate and up, in the layouts for a few tokens: the bits of one by one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse import to_dense_runtime, to_runtime
from hf_sparse.kernels import KERNELS
from hf_sparse.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import all_present
from tests.helpers.runtime_models import round_to_bfloat16, sparse, sparse_decoder
from tests.helpers.structures import batch

NAMES = ["bitmask", "bitmask-int8", "bitmask-int4"]


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    all_present(monkeypatch)


def joint_forms(model: nn.Module) -> list[str]:
    """Return the forms of what is packed as one weight."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return [layer.joint.form for layer in layers if layer.joint is not None and layer.joint.layers[0] is layer]


def one_by_one(model: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the runtime form of a copy, each of its layers packed alone."""
    twin = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setitem(KERNELS._kernels, kernel, dataclasses.replace(KERNELS[kernel], joins=None))
        to_runtime(twin, kernel)
    assert joint_forms(twin) == []
    return twin


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_outputs_are_those_of_layers_one_by_one_to_the_bit(
    family: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse_decoder(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = one_by_one(model, kernel, monkeypatch)
    to_runtime(model, kernel)
    assert sorted(set(joint_forms(model))) == ["gate_up", "qkv"]
    ids = torch.randint(0, 8, (2, 9))
    with torch.inference_mode():
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
            for some in (ids, ids[:1], ids[:1, :1], ids[:, :1]):
                assert torch.equal(each(some).logits, plain(some).logits)
    to_dense_runtime(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_hook_on_a_layer_is_called_and_the_others_compute_for_themselves() -> None:
    model = sparse_decoder("llama")
    to_runtime(model, "bitmask")
    ids, seen = torch.randint(0, 8, (1, 3)), list[str]()
    expected = model(ids).logits
    block = model.model.layers[0]
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert seen == ["self_attn.k_proj", "mlp.up_proj"]


def test_layer_that_is_replaced_is_called() -> None:
    model = sparse_decoder("llama")
    to_runtime(model, "bitmask-int8")
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 2, model.config.hidden_size)
    mlp.up_proj = nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features).eval()
    with torch.inference_mode():
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        assert torch.equal(mlp(x), expected)


def test_exact_values_join_only_where_no_number_changes() -> None:
    joins = KERNELS["bitmask"].joins
    assert joins is not None
    rounded, other = torch.randn(8, 16).bfloat16().float(), torch.randn(8, 16)
    assert joins([rounded, rounded])
    assert joins([other, other])
    assert not joins([rounded, other]), "the values of both would take 4 bytes"
    assert not joins([rounded[:6], rounded]), "C++ adds up four outputs at a time"


def test_whole_encoders_by_name_share_inputs_too() -> None:
    model, inputs = sparse("bert"), batch("bert")
    with torch.no_grad():
        expected = model(**inputs).logits
        to_runtime(model, "bitmask")
        assert set(joint_forms(model)) == {"qkv"}
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", NAMES)
def test_saved_form_computes_the_same_bits(kernel: str, tmp_path: Path) -> None:
    model = sparse_decoder("gemma3")
    round_to_bfloat16(model)
    to_runtime(model, kernel)
    hf_sparse.save_runtime(model, tmp_path / "saved")
    loaded = hf_sparse.load_runtime(tmp_path / "saved")
    assert joint_forms(loaded) == joint_forms(model)
    ids = torch.randint(0, 8, (1, 5))
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["bitmask", "bitmask-int8"])
def test_compiled_steps_with_a_static_cache_compute_the_same(kernel: str) -> None:
    from transformers import StaticCache

    model = sparse_decoder("gemma3")
    to_runtime(model, kernel)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 8, (1, 6))
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(ids[:, :3], past_key_values=cache)
        for place in range(3, 6):
            given = {"input_ids": ids[:, place : place + 1], "position_ids": torch.tensor([[place]])}
            expected = model(**given, past_key_values=caches[0]).logits
            found = step(**given, past_key_values=caches[1]).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
