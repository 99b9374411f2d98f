"""Tiny mixtures of experts, and what their routers and experts do, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.helpers import decoders, oneshot

KINDS = ("mixtral", "qwen3-moe", "gpt-oss", "llama4")
EXPERTS, TOP_K = 5, 2


def build(kind: str, unreached: bool = False) -> Any:
    """Return a model in float32 with five experts, of which each token goes to two.

    Args:
        unreached: let the router of the second block never choose expert 4: its row is zero, and the others are two
            pairs of opposite rows, of which one row of each pair always gets more.
    """
    torch.manual_seed(0)
    sizes = {**decoders.SIZES, "num_experts_per_tok": TOP_K}
    if kind == "gpt-oss":
        model: Any = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_local_experts=EXPERTS))
    elif kind == "llama4":
        sizes |= {"intermediate_size_mlp": 12, "num_local_experts": EXPERTS, "interleave_moe_layer_step": 1}
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))
    elif kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=EXPERTS))
    else:
        maker, config = {
            "qwen2-moe": (transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig),
            "qwen3-moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig),
        }[kind]
        own = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
        model = maker(config(**sizes, num_experts=EXPERTS, **own))
    for name, parameter in model.named_parameters():
        drawn = torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.1)
        parameter.data = drawn + (1.0 if "norm" in name else 0.0)
    if unreached:
        gate = router(mixture(model, 1))
        first, second = gate.weight.data[0].clone(), gate.weight.data[1].clone()
        gate.weight.data.copy_(torch.stack([first, -first, second, -second, 0 * first]))
        if getattr(gate, "bias", None) is not None:
            gate.bias.data.zero_()
    return model.eval()


def batches() -> list[dict[str, Tensor]]:
    """Return batches of different sizes, of which one is padded on the left."""
    padded = decoders.batch()
    ids = torch.randint(5, decoders.VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}, {"input_ids": ids}]


def mixture(model: Any, block: int) -> Any:
    """Return the module of a block with router and experts."""
    layer = model.model.layers[block]
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def router(module: Any) -> Any:
    """Return the router of a mixture."""
    return module.router if hasattr(module, "router") else module.gate


def _is_llama4(module: Any) -> bool:
    return type(module).__name__.startswith("Llama4")


def matrices(experts: Any) -> dict[str, Tensor]:
    """Return the weights of the experts as `(experts, out, in)`, views of what is stored."""
    turned = type(experts).__name__.startswith(("GptOss", "Llama4"))
    return {
        name: getattr(experts, name).data.transpose(1, 2) if turned else getattr(experts, name).data
        for name in ("gate_up_proj", "down_proj")
    }


def routed(model: Any, block: int, data: list[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Return what goes into both weights of each expert of a block: from the logits of the router on, by hand."""
    module, seen = mixture(model, block), []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    kept = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in data]
    x = torch.cat([hidden[mask] for hidden, mask in zip(seen, kept, strict=True)])
    gate, experts = router(module), module.experts
    logits = x @ gate.weight.data.T + (gate.bias.data if getattr(gate, "bias", None) is not None else 0.0)
    chosen = [set(row.argsort(descending=True)[:TOP_K].tolist()) for row in logits]
    # Llama 4 multiplies the tokens by the weights of the router, and the others what comes out of the experts.
    scale = torch.sigmoid(logits.float()).to(x.dtype) if _is_llama4(module) else None
    found = {}
    for expert in range(EXPERTS):
        reached = torch.tensor([expert in both for both in chosen])
        rows = x[reached] if scale is None else x[reached] * scale[reached, expert, None]
        out = rows @ matrices(experts)["gate_up_proj"][expert].T
        if hasattr(experts, "gate_up_proj_bias"):
            out = out + experts.gate_up_proj_bias.data[expert]
            first, second = out[:, ::2].clamp(max=experts.limit), out[:, 1::2].clamp(-experts.limit, experts.limit)
            inner = (second + 1) * first * torch.sigmoid(first * experts.alpha)
        else:
            first, second = out.chunk(2, dim=1)
            inner = F.silu(first) * second
        found[expert] = {"gate_up_proj": rows, "down_proj": inner}
    return found


def prune_by_hand(model: nn.Module, data: list[dict[str, Tensor]], prune: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Prune the experts of a model block by block, each with its own tokens, and return how many had none.

    Args:
        prune: returns a weight `(out, in)` without some entries, from it and its inputs; without inputs, the largest
            entries stay, as with inputs that are all alike.
    """
    missed = 0
    for block in range(2):
        inputs = routed(model, block, data)
        for name, stack in matrices(mixture(model, block).experts).items():
            for expert, weight in enumerate(stack):
                x = inputs[expert][name]
                missed += int(not len(x))
                weight.copy_(prune(weight, x) if len(x) else magnitude(weight, prune))
    return missed // 2


def magnitude(weight: Tensor, prune: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return what a method leaves where all inputs are independent and equally large, but with its dense values."""
    alike = torch.eye(weight.shape[1], dtype=weight.dtype)
    return torch.where(prune(weight, alike) != 0, weight, 0.0)


def block_scores(weight: Tensor, x: Tensor, rows: int, columns: int, sparsity: float) -> Tensor:
    """Return a weight without the blocks of each row of blocks with the lowest mean of `|W_ij| ‖x_j‖₂`."""
    scores = weight.double().abs() * (x.double() ** 2).sum(0).sqrt()
    means = scores.reshape(len(weight) // rows, rows, -1, columns).mean((1, 3))
    kept = torch.ones_like(means, dtype=torch.bool)
    for row, values in enumerate(means):
        kept[row, values.argsort(stable=True)[: oneshot._removed(len(values), sparsity, None)]] = False
    return torch.where(kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1), weight, 0.0)
