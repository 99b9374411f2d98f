"""Tiny decoders of every family, as tests of structured pruning use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers import large_weights

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def _sized(kind: str, **fixed: Any) -> Callable[..., Any]:
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    return lambda **options: model(config(**{**SIZES, **fixed, **options}))


def _gemma3(**options: Any) -> Any:
    sizes = {**SIZES, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    sizes |= {"query_pre_attn_scalar": 4, "final_logit_softcapping": None}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**sizes, **options}))


def _gpt2(**options: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 12, "n_positions": 64}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **rates, **ids, **options}))


def _neox(**options: Any) -> Any:
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    sizes |= {
        "hidden_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    }
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**sizes, **options}))


def _opt(**options: Any) -> Any:
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    sizes |= {"ffn_dim": sizes.pop("intermediate_size"), "word_embed_proj_dim": 16, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**sizes, **options}))


GEMMA2 = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "query_pre_attn_scalar": 4}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _sized("Llama", attention_bias=True),
    "mistral": _sized("Mistral", sliding_window=5),
    "qwen2": _sized("Qwen2"),
    "qwen3": _sized("Qwen3"),
    "granite": _sized("Granite"),
    "smollm3": _sized("SmolLM3", no_rope_layers=[1, 0]),
    "gemma": _sized("Gemma"),
    "gemma2": _sized("Gemma2", **GEMMA2),
    "gemma3": _gemma3,
    "phi3": _sized("Phi3", sliding_window=5),
    "mixtral": _sized("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": _sized(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12
    ),
    "qwen3-moe": _sized("Qwen3Moe", num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2, mlp_only_layers=[0]),
    "gpt-neox": _neox,
    "gpt2": _gpt2,
    "opt": _opt,
}
ALIKE = ("mistral", "qwen2", "granite", "smollm3", "gemma")
"""Families whose modules compute as those of others here do: in slow tests."""
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in FAMILIES]
MOE = ("mixtral", "qwen2-moe", "qwen3-moe")
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def build(family: str, seed: int = 0, **options: Any) -> Any:
    """Return a model of a family, see `large_weights.build`."""
    return large_weights.build(FAMILIES[family], ("norm", ".ln_"), seed, draw_embeddings=True, **options)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Return three sequences, padded on the left, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
