"""Tiny models trained by DDP and under fully_shard (FSDP2), with the masks of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse import Pruner, SparsityConfig
from hf_sparse.pruning.mask_sync import digest

BLOCKS = {"name": "block", "rows": 4, "cols": 1}
PATTERNS: dict[str, dict[str, Any]] = {
    "element": {},
    "4x1": {"pattern": BLOCKS},
    "head+neuron": {"pattern": "head+neuron", "sparsity": 0.5},
    "2:4": {"pattern": "2:4", "sparsity": None},
}
MORE_PATTERNS: dict[str, dict[str, Any]] = {
    "global": {"selection": "global"},
    "global 4x1": {"pattern": BLOCKS, "selection": "global"},
    "32x2": {"pattern": {"name": "block", "rows": 32, "cols": 2}, "sparsity": 0.5},  # spans the rows of two processes
    "row": {"pattern": "row", "sparsity": 0.5},
    "column": {"pattern": "column", "sparsity": 0.5},
    "per_row": {"selection": "per_row"},
    "threshold": {"selection": "threshold"},
    "budget": {"pattern": "head+neuron", "selection": {"name": "budget", "remaining": 0.5}, "sparsity": None},
}
SCORERS: dict[str, Any] = {"magnitude": "magnitude", "movement": {"name": "movement", "learning_rate": 1.0}}
GRADIENT_SCORERS: dict[str, Any] = {
    "gradient": {"name": "gradient", "momentum": 0.5},
    "taylor": "taylor",
    "rigl": {"name": "rigl", "every": 1, "until": 0.9},
    "set": {"name": "set", "every": 1, "until": 0.9},
}
STEPS, BATCH = 3, 8
VOCABULARY = 50
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family == "bert":
        no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **_SIZES, **no_dropout))
    if family == "t5":
        options: dict[str, Any] = {"decoder_start_token_id": 0}
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
                **options,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, tie_word_embeddings=False, **_SIZES)
    )


def shard(model: Any) -> Any:
    """Apply `fully_shard` to the blocks of a model and to itself."""
    for module in list(model.modules()):
        if type(module).__name__ in ("BertLayer", "T5Block", "LlamaDecoderLayer"):
            fully_shard(module)
    return fully_shard(model)


def batch(step: int, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Return the share of a rank of the batch of a step, the same over all ranks however many there are."""
    ids = torch.randint(1, VOCABULARY, (BATCH, 6), generator=torch.Generator().manual_seed(step))[
        rank::ranks
    ].contiguous()
    return {"input_ids": ids, "labels": ids}


def trained(family: str, scorer: str, options: dict[str, Any], how: str) -> tuple[Pruner, list[int]]:
    """Train a few steps; return the pruner and a number for the masks after each step.

    Args:
        how: "ddp", "fsdp", "fsdp first" for masks on a model that is sharded already, or "alone" for one process with
            all batches, without a group or in one.
    """
    called: Any = build(family)
    model = called
    if how == "fsdp first":
        shard(model)
    method = {**SCORERS, **GRADIENT_SCORERS}[scorer]
    pruner = Pruner(
        model, SparsityConfig(**{"sparsity": 0.7, "scorer": method, "schedule": {"name": "linear"}, **options})
    ).attach()
    if how == "fsdp":
        shard(model)
    elif how == "ddp":
        called = DistributedDataParallel(model)
    rank, ranks = (0, 1) if how == "alone" else (dist.get_rank(), dist.get_world_size())
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return pruner, run(pruner, lambda step: called(**batch(step, rank, ranks)).loss.backward(), update)


def run(pruner: Pruner, backward: Callable[[int], object], update: Callable[[], object]) -> list[int]:
    """Train `STEPS` steps; return a number for the masks at the beginning and after each."""

    def masks_now() -> int:
        return digest(member.masked.mask for unit in pruner.units for member in unit.members)

    pruner.step(0.0)
    masks = [masks_now()]
    for step in range(STEPS):
        backward(step)
        pruner.observe()
        update()
        pruner.step((step + 1) / STEPS)
        masks.append(masks_now())
    pruner.finish()
    return masks
