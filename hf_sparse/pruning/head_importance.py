"""How important each attention head of a model is, from a pass over data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparsityError
from ..formats.structure import Cut
from ..modeling.architectures import SubBlock, find_sub_blocks
from .compaction import edits_of
from .processes import sum_of_counts, sum_over_processes


def head_importance(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Return the sensitivity of the loss to each head: the mean over examples of `|dL/dxi|`.

    `xi` is a gate on the output of the head, 1 at all times, and L the loss of one example: the absolute value is taken
    for each example and the mean after it. The model runs as in evaluation (no dropout) and is left as it was, without
    gradients.

    The loss that the model returns must be a mean over the examples of the batch, as it is for classification. Where
    it is a mean over tokens (labels of T5), examples with more tokens count for more, unless each batch has one
    example.

    Args:
        model: of a family that `hf_sparse.modeling.architectures` knows.
        batches: keyword arguments of the model, with labels; tensors on its device.

    Shapes: one row for each attention in the order of the model, one column for each head it had when it was made. A
    head that compaction has removed is NaN.

    Raises:
        PatternError: if no architecture knows the model.
        SparsityError: if there is no batch, or the model returns no loss, or one that is not finite.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=10, **sizes))
        >>> batch = {"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": torch.tensor([0, 1, 1])}
        >>> head_importance(model, [batch]).shape
        torch.Size([2, 4])

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1 and equation 2.
    """
    found = head_sensitivity(model, batches)
    return _table(model, [block for block, _ in found], {block.name: values for block, values in found})


def head_sensitivity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[tuple[SubBlock, Tensor]]:
    """Return each attention with the mean of `|dL/dxi|` for each head it has now, see `head_importance`."""
    blocks = [block for block in find_sub_blocks(model, "head importance") if block.kind == "attention"]
    gates = [_Gate(block) for block in blocks if block.groups]
    hooks = [gate.block.output.register_forward_pre_hook(gate) for gate in gates]
    sums = {block.name: torch.zeros(block.groups, dtype=torch.float64) for block in blocks}
    training, samples = model.training, 0
    model.eval()
    try:
        for batch in batches:
            size = _batch_size(batch)
            for gate, gradient in zip(gates, _gradients(model, batch, gates), strict=True):
                # An example may be several rows (the choices of a question), and its loss is a share of the mean.
                rows = gradient.double().view(size, -1, gradient.shape[-1]).sum(1) * size
                sums[gate.block.name] += rows.abs().sum(0).cpu()
            samples += size
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    samples = sum_of_counts(samples)
    for values in sums.values():
        sum_over_processes(values)
    if not samples:
        raise SparsityError("head importance needs data, and there was no batch")
    if not all(bool(values.isfinite().all()) for values in sums.values()):
        raise SparsityError(
            "the loss of the model, or its gradient, is not finite on these examples, so the importance of its heads "
            "is not known; are there NaN among its weights?"
        )
    return [(block, sums[block.name] / samples) for block in blocks]


class _Gate:
    """A hook that multiplies what the heads give to the output layer by 1, once for each row and head."""

    def __init__(self, block: SubBlock) -> None:
        self.block = block
        self.ones: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = inputs
        self.ones = torch.ones(hidden.shape[0], self.block.groups, dtype=hidden.dtype, device=hidden.device)
        self.ones.requires_grad_()
        return (hidden * self.ones.repeat_interleave(self.block.size, 1)[:, None],)


def _batch_size(batch: Mapping[str, Any]) -> int:
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    if len(sizes) != 1 or not min(sizes):
        raise SparsityError(
            f"a batch has tensors with one row for each example, but the first sides are {sorted(sizes)}"
        )
    return int(sizes.pop())


def _gradients(model: nn.Module, batch: Mapping[str, Any], gates: list[_Gate]) -> tuple[Tensor, ...]:
    for gate in gates:
        gate.ones = None
    with torch.enable_grad():
        loss = loss_of(model, batch, "head importance")
        used = [gate.ones for gate in gates if gate.ones is not None]
        if len(used) < len(gates):
            raise SparsityError(
                f"'{next(g for g in gates if g.ones is None).block.name}' took no part in the forward pass"
            )
        return torch.autograd.grad(loss, used)


def loss_of(model: nn.Module, batch: Mapping[str, Any], who: str) -> Tensor:
    """Return the loss of a batch.

    Raises:
        SparsityError: if the model returns none.
    """
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise SparsityError(f"the model returned no loss, which {who} is about; are there labels in the batch?")
    return loss


def _table(model: nn.Module, blocks: list[SubBlock], found: Mapping[str, Tensor]) -> Tensor:
    edits = edits_of(model)
    cuts = [edits.heads.get(block.name, Cut.of(block.groups)) for block in blocks]
    table = torch.full((len(blocks), max(cut.before for cut in cuts)), float("nan"), dtype=torch.float64)
    for row, block, cut in zip(table, blocks, cuts, strict=True):
        if cut.kept:
            row[list(cut.kept)] = found[block.name]
    return table.float()
