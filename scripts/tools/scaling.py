"""What training a sparse model takes of each process: memory and communication, computed from the config of a model.

    python scripts/tools/scaling.py [--processes 8]     # prints the tables of recipes/SCALING.md

The numbers are those of training in float32 with AdamW and a score for each weight (movement, pattern element), without
activations. `tests/scripts/test_scaling.py` compares them with what two processes hold.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from hf_sparse import Pruner
from hf_sparse.modeling.blocks import block_prefixes
from hf_sparse.modeling.layer_matching import block_layers
from hf_sparse.pruning.shards import local

FLOAT = 4
T5_11B: dict[str, Any] = {
    "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "vocab_size": 32128,
    "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
DIVIDED: dict[str, tuple[str, ...]] = {
    "DDP": (),
    "ZeRO-1": ("optimizer",),
    "ZeRO-2": ("optimizer", "gradients"),
    "ZeRO-3": ("optimizer", "gradients", "weights", "masks"),
    "FSDP2": ("optimizer", "gradients", "weights", "masks"),
}
"""What each strategy divides over the processes; scores as what they are of: weights, gradients, optimizer."""
LEARNED = tuple(strategy for strategy in DIVIDED if strategy != "ZeRO-3")
"""Strategies under which scores are learned."""
SPARSITY = 0.9
"""Of the tables: masks beside the weights (ZeRO-3) take the removed values too."""
PARTS = ("weights", "gradients", "optimizer", "masks", "scores", "one block")


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model.

    Attributes:
        parameters: entries of all parameters.
        targeted: entries of the weights with masks.
        block: entries of the parameters of the largest block.
        block_targeted: entries of its weights with masks.
        layer: entries of the largest weight with a mask.
        vocabulary: entries of the input embeddings, and of an LM head that is not tied to them.
    """

    parameters: int
    targeted: int
    block: int
    block_targeted: int
    layer: int
    vocabulary: int = 0


def sizes_of(model: nn.Module) -> Sizes:
    """Return the numbers of a model, which may be on the meta device and have masks or not."""
    scores = {name for name, _ in model.named_parameters() if name.endswith(".scores")}
    parameters = {name: each.numel() for name, each in model.named_parameters() if name not in scores}
    layers = {name: layer.weight.numel() for name, layer in block_layers(model).items()}
    blocks: dict[str, list[int]] = {}
    for prefix in block_prefixes(model):
        for counts, place in ((parameters, 0), (layers, 1)):
            for name, count in counts.items():
                if name.startswith(prefix):
                    number = name[len(prefix) :].partition(".")[0]
                    blocks.setdefault(prefix + number, [0, 0])[place] += count
    block, block_targeted = max(blocks.values())
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = parameters.get("lm_head.weight", 0)  # one that is tied is not listed
    vocabulary = sum(table.numel() for table in tables) + head
    return Sizes(
        sum(parameters.values()), sum(layers.values()), block, block_targeted, max(layers.values()), vocabulary
    )


def memory(sizes: Sizes, strategy: str, processes: int, learned: bool, sparsity: float = SPARSITY) -> dict[str, float]:
    """Return bytes on each process, by what they are for.

    Args:
        learned: whether there is a score for each targeted weight, as in movement pruning; else as in magnitude.
        sparsity: of the masks.
    """
    share = {part: processes if part in DIVIDED[strategy] else 1 for part in ("weights", "gradients", "optimizer")}
    # ZeRO-1 and 2 copy the share of the weights that a process updates.
    states = 3 if strategy in ("ZeRO-1", "ZeRO-2") else 2
    of_one = FLOAT / share["weights"] + FLOAT / share["gradients"]
    found: dict[str, float] = {
        "weights": FLOAT * sizes.parameters / share["weights"],
        "gradients": FLOAT * sizes.parameters / share["gradients"],
        "optimizer": states * FLOAT * sizes.parameters / share["optimizer"],
        "masks": sizes.targeted / share["weights"],
        "scores": sizes.targeted * (of_one + states * FLOAT / share["optimizer"]) if learned else 0.0,
        "one block": 0.0,
    }
    if strategy == "ZeRO-3":
        found["masks"] += FLOAT * sparsity * sizes.targeted / processes  # the removed values
        found["one block"] = 2 * FLOAT * sizes.block + sizes.layer  # and of one layer at a time the gathered mask
    if strategy == "FSDP2":
        trained = sizes.block + (sizes.block_targeted if learned else 0)
        # Gathered weights and their gradients; and of one layer at a time the gathered mask and the masked weight.
        found["one block"] = 2 * FLOAT * trained + (1 + FLOAT) * sizes.layer
    return found


def tensor_parallel(sizes: Sizes, processes: int) -> float:
    """Return the bytes of the weights on each process under tensor parallelism of a decoder of transformers.

    It divides the weights of the blocks, the embeddings and the head; norms are whole on every process.
    """
    divided = sizes.targeted + sizes.vocabulary
    return FLOAT * (sizes.parameters - divided + divided / processes)


def communication(sizes: Sizes, strategy: str, processes: int, learned: bool) -> float:
    """Return the bytes that each process receives in a training step, with collectives along a ring."""
    trained = sizes.parameters + (sizes.targeted if learned else 0)
    # Divided weights are gathered for the forward and the backward pass, and gradients reduced; else gradients are
    # reduced to shares and these, or what was updated of them, are gathered. Masks are gathered to mask gradients, and
    # under FSDP2 weights in both passes.
    gathered = {"ZeRO-3": 1, "FSDP2": 3}.get(strategy, 0)
    total = (3 if gathered else 2) * FLOAT * trained + gathered * sizes.targeted
    return total * (processes - 1) / processes


def measured(pruner: Pruner, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes that this process holds after a backward pass and a step."""
    masks = [member.masked for unit in pruner.units for member in unit.members]
    scores = [masked.scores for masked in masks if masked.scores is not None]
    known = {id(score) for score in scores}
    weights = [parameter for parameter in pruner.model.parameters() if id(parameter) not in known]
    states = {key: [t for t in state.values() if t.ndim] for key, state in optimizer.state.items()}
    of_scores = [*scores, *(t for score in scores for t in states.get(score, ()))]
    return {
        "weights": _bytes(weights),
        "gradients": _bytes_of_gradients(weights),
        "optimizer": _bytes([t for weight in weights for t in states.get(weight, ())]),
        "masks": _bytes([masked.mask for masked in masks]),
        "scores": _bytes(of_scores) + _bytes_of_gradients(scores),
    }


def measured_with_deepspeed(pruner: Pruner, engine: Any) -> dict[str, int]:
    """Return the bytes that this process holds after a step by an engine of DeepSpeed.

    Gradients are freed by then. What the optimizer has of scores is in the same flat tensors as what it has of weights,
    so they are counted together.
    """
    masks: list[Any] = [member.masked for unit in pruner.units for member in unit.members]
    parameters: list[Any] = list(pruner.model.parameters())
    here = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    states = engine.optimizer.optimizer.state.values()
    copies = getattr(engine.optimizer, "single_partition_of_fp32_groups", ())  # ZeRO-3 has none in float32
    return {
        "weights and scores": sum(tensor.nbytes for tensor in here),
        "optimizer": sum(tensor.nbytes for state in states for tensor in state.values() if tensor.ndim)
        + sum(tensor.nbytes for tensor in copies),
        "masks": _bytes([masked.mask for masked in masks])
        + sum(masked.removed.nbytes for masked in masks if getattr(masked, "removed", None) is not None),
    }


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _bytes(tensors: Any) -> int:
    return sum(local(tensor).untyped_storage().nbytes() for tensor in tensors)


def _bytes_of_gradients(parameters: list[nn.Parameter]) -> int:
    # fully_shard has the gradients of a block in one storage, those of weights and scores.
    return sum(local(gradient).nbytes for gradient in _gradients(parameters))


def large_models() -> dict[str, nn.Module]:
    """Build the models of the tables, without memory."""
    with torch.device("meta"):
        return {
            "T5-11B": AutoModelForSeq2SeqLM.from_config(T5Config(**T5_11B)),
            "7B decoder": AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_7B)),
        }


def table(processes: int) -> str:
    """Return the Markdown table for a number of processes."""
    lines = [
        f"| model | strategy, {processes} processes | scorer | {' | '.join(PARTS)} | total | received per step |",
        "|---|---|---|" + "---|" * (len(PARTS) + 2),
    ]
    for name, model in large_models().items():
        sizes = sizes_of(model)
        for strategy in DIVIDED:
            for scorer in ("magnitude", "movement") if strategy in LEARNED else ("magnitude",):
                parts = memory(sizes, strategy, processes, scorer == "movement")
                sent = communication(sizes, strategy, processes, scorer == "movement")
                cells = [f"{size / 1e9:.1f}" for size in (*parts.values(), sum(parts.values()), sent)]
                lines.append(f"| {name} | {strategy} | {scorer} | {' | '.join(cells)} |")
        if getattr(model, "_tp_plan", None):  # for T5 transformers has none
            weights = f"{tensor_parallel(sizes, processes) / 1e9:.1f}"
            lines.append(f"| {name} | tensor parallelism | - | {weights} |{' - |' * 5} {weights} | see below |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    print(table(parser.parse_args().processes))


if __name__ == "__main__":
    main()
