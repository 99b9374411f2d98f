"""Wanda and SparseGPT as the papers write them, in float64 and without any thought of speed, and small decoders."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.helpers import tiny

NM = tuple[int, int]


def wanda(weight: Tensor, x: Tensor, sparsity: float, nm: NM | None = None) -> Tensor:
    """Return a weight `(out, in)` without those of each row with the lowest `|W_ij| ‖x_j‖₂`."""
    weight, x = weight.double().clone(), x.double()
    scores = weight.abs() * (x**2).sum(0).sqrt()
    for row in range(len(weight)):
        for group in _groups(weight.shape[1], nm):
            lowest = scores[row, group].argsort(stable=True)
            weight[row, group[lowest[: _removed(len(group), sparsity, nm)]]] = 0.0
    return weight


def grid_scale(values: Sequence[float], steps: int, digits: int) -> float:
    """Return the largest value / steps, rounded up to as many binary digits."""
    largest = max(abs(value) for value in values) / steps
    if largest == 0:
        return 0.0
    mantissa, exponent = math.frexp(largest)
    return math.ldexp(math.ceil(mantissa * 2**digits), exponent - digits)


BITS = {8: (128, 127, 1), 4: (64, 8, 5)}
"""Columns that share a scale, steps to either side and binary digits of a scale, by the bits of a value."""


def sparsegpt(
    weight: Tensor,
    x: Tensor,
    sparsity: float,
    nm: NM | None = None,
    damping: float = 0.01,
    block: int = 128,
    bits: int | None = None,
) -> Tensor:
    """Return a weight as algorithm 1 of the paper leaves it; columns of inputs that are always zero are zero.

    Args:
        bits: round what is kept, as section 3.5 says; `block` has to be a multiple of the columns of a scale.
    """
    weight, x = weight.double().clone(), x.double()
    columns = weight.shape[1]
    hessian = 2.0 / len(x) * x.T @ x
    for column in range(columns):
        if hessian[column, column] == 0:
            hessian[column, column] = 1.0
            weight[:, column] = 0.0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    scales: list[float] = []
    for column in range(columns):
        group: Sequence[int] = ()
        if nm is not None and column % nm[1] == 0:
            group = range(column, column + nm[1])
            for row in range(len(weight)):
                scores = torch.stack([weight[row, j] ** 2 / factor[j, j] ** 2 for j in group])
                kept[row, group[0] + scores.argsort(stable=True)[: nm[1] - nm[0]]] = False
        elif nm is None and column % block == 0:
            group = range(column, min(column + block, columns))
            scores = weight[:, group[0] : group[-1] + 1] ** 2 / factor.diagonal()[group[0] : group[-1] + 1] ** 2
            lowest = scores.flatten().argsort(stable=True)[: _removed(scores.numel(), sparsity, None)]
            chosen = torch.ones(scores.shape, dtype=torch.bool)
            chosen.view(-1)[lowest] = False
            kept[:, group[0] : group[-1] + 1] = chosen
        new = torch.where(kept[:, column], weight[:, column], 0.0)
        if bits is not None:
            together, steps, digits = BITS[bits]
            if column % together == 0:
                ahead = torch.where(kept, weight, 0.0)[:, column : column + together].tolist()
                scales = [grid_scale(values, steps, digits) for values in ahead]
            for row, scale in enumerate(scales):
                step = round(float(new[row]) / scale) if scale else 0
                new[row] = max(-steps, min(steps, step)) * scale
        error = (weight[:, column] - new) / factor[column, column]
        for j in range(column + 1, columns):
            weight[:, j] -= error * factor[column, j]
        weight[:, column] = new
    return weight


def _groups(columns: int, nm: NM | None) -> list[Tensor]:
    size = columns if nm is None else nm[1]
    return list(torch.arange(columns).split(size))


def _removed(size: int, sparsity: float, nm: NM | None) -> int:
    return size - math.floor((1 - sparsity) * size + 1e-9) if nm is None else nm[1] - nm[0]


def block_by_block(
    model: nn.Module,
    blocks: Iterable[str],
    batches: Sequence[Mapping[str, Any]],
    prune: Callable[[Tensor, Tensor], Tensor],
    is_layer: Callable[[nn.Module], bool],
) -> None:
    """Prune each block with the inputs that the whole model gives it now: every block from the very beginning."""
    for block in blocks:
        layers = {n: m for n, m in model.get_submodule(block).named_modules() if is_layer(m)}
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, inputs=seen[name]: inputs.append(args[0]))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            x = torch.cat([inputs.flatten(0, -2) for inputs in seen[name]])
            weight: Any = layer.weight.data
            turned = not isinstance(layer, nn.Linear)
            weight.copy_(prune(weight.T, x).T if turned else prune(weight, x))


def llama(**options: Any) -> LlamaForCausalLM:
    """Return a decoder with two query heads for each key, of random weights in float64."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).double().eval()


def gemma() -> Gemma3ForCausalLM:
    """Return a decoder whose layers take turns with sliding and full attention."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=4, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).double().eval()


def gpt2() -> GPT2LMHeadModel:
    """Return a decoder of `Conv1D` layers."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def bert() -> BertForMaskedLM:
    """Return an encoder of random weights in float64."""
    torch.manual_seed(0)
    return BertForMaskedLM(tiny.config(vocab_size=50, max_position_embeddings=64)).double().eval()


def t5() -> T5ForConditionalGeneration:
    """Return an encoder-decoder of random weights in float64."""
    torch.manual_seed(0)
    start: Any = {"decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", **start,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double().eval()


def token_batches(count: int = 3, size: int = 2, length: int = 12) -> list[dict[str, Tensor]]:
    """Return batches of random tokens below 50."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 50, (size, length), generator=generator)} for _ in range(count)]


WORDS = [f"w{number}" for number in range(47)]


def save_llama(folder: Path, bos: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a decoder with random weights, and a tokenizer of words that begins a text with `<s>` or does not."""
    model: Any = llama(**options)
    model.to(dtype).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106  no password
    backend.pre_tokenizer = WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = dict(zip(("unk_token", "bos_token", "eos_token"), ("<unk>", "<s>", "</s>"), strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    made.save_pretrained(folder)
    return folder


def write_text(path: Path, words: int = 400, seed: int = 0) -> Path:
    """Write a text of words, some of which follow others more often."""
    draw = random.Random(seed)  # noqa: S311  no secrets
    text, last = [], 0
    for _ in range(words):
        last = (last * 3 + draw.randrange(4)) % len(WORDS)
        text.append(WORDS[last])
    path.write_text(" ".join(text), encoding="utf-8")
    return path
