"""How much the loss minds when one weight, or one head, is pruned alone, and what that says about a recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .allocation import by_sensitivity, erdos_renyi, groups_of
from .architectures import known_sub_blocks
from .data import load_split
from .drawing import new_figure, write_figure
from .errors import RecipeError, SparsityError
from .heads import HeadTable
from .importance import head_importance
from .kth import keep_highest
from .labelled import LabelledBatches
from .loading import load_tokenizer, load_whole
from .recipe_sections import DataSection
from .recipe_text import dump_yaml
from .selection import kept_count
from .targets import match_layers

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The loss by the sparsity of one weight, all others as they are. `print` it for a table.

    Args:
        levels: sparsities, ascending.
        dense: loss of the model as it is.
        losses: one for each level, by name of the layer.
        shapes: of the weights.
        heads: importance of the heads; None where no family of architectures knows the model.
        samples: how many texts it was measured on.
    """

    levels: tuple[float, ...]
    dense: float
    losses: dict[str, tuple[float, ...]]
    shapes: dict[str, tuple[int, int]]
    heads: HeadTable | None
    samples: int

    def allocations(self, sparsity: float) -> dict[str, list[dict[str, Any]]]:
        """Return the groups of a recipe for a total sparsity, by how they were found."""
        sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
        increases = {name: [loss - self.dense for loss in losses] for name, losses in self.losses.items()}
        return {
            "sensitivity": groups_of(by_sensitivity(sizes, self.levels, increases, sparsity), sizes),
            "erdos_renyi": groups_of(erdos_renyi(self.shapes, sparsity), sizes),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "levels": list(self.levels),
            "dense_loss": self.dense,
            "losses": {name: list(losses) for name, losses in self.losses.items()},
            "heads": None if self.heads is None else self.heads.to_dict(),
            "samples": self.samples,
        }

    def __str__(self) -> str:
        wide = max(len(name) for name in (*self.losses, "layer"))
        lines = [f"{'layer':<{wide}}  " + " ".join(f"{level:>9.1%}" for level in self.levels)]
        for name, losses in self.losses.items():
            lines.append(f"{name:<{wide}}  " + " ".join(f"{loss - self.dense:>+9.4f}" for loss in losses))
        lines.append(f"Increase of the loss, which is {self.dense:.4f} dense, on {self.samples} texts")
        return "\n".join(lines) + ("" if self.heads is None else f"\n\n{self.heads}")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the loss over sparsity, one line for each layer, and write it to a file (png, pdf or svg by its ending).

        Raises:
            BackendError: without matplotlib.
            RecipeError: for an ending that matplotlib cannot write.
        """
        figure = new_figure(9, max(4.0, 0.2 * len(self.losses)))
        axes = figure.subplots()
        for place, (name, losses) in enumerate(self.losses.items()):
            style = ("-", "--", ":", "-.")[place // 10 % 4]  # matplotlib has ten colours
            axes.plot((0.0, *self.levels), (self.dense, *losses), style, marker="o", markersize=3, label=name)
        axes.set_xlabel("sparsity of this layer alone")
        axes.set_ylabel("loss")
        axes.set_title(f"Sensitivity of layers, {self.samples} texts", fontsize=10)
        figure.legend(loc="outside right upper", fontsize=7)
        write_figure(figure, path)


def layer_losses(
    model: nn.Module, layers: Mapping[str, nn.Linear], data: Sequence[Batch], levels: Sequence[float]
) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Return the loss of the model, and with the lowest magnitudes of one layer removed, for each layer and level.

    The weights are restored to the last bit, whatever happens.

    Raises:
        RecipeError: for levels that are not ascending in (0, 1), or no batch.
        SparsityError: if the model returns no loss, or there are NaN among the weights.

    Source: Han et al. 2015, "Learning both Weights and Connections", section 4.
    """
    if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
        raise RecipeError(f"levels are ascending sparsities above 0 and below 1, not {list(levels)}")
    if not data:
        raise RecipeError("sensitivity needs data, and there was no batch")
    training = model.training
    model.eval()
    try:
        dense = mean_loss(model, data)
        found = {}
        for name, layer in tqdm(layers.items(), desc="Sensitivity"):
            found[name] = tuple(_pruned_losses(model, layer.weight, data, levels))
    finally:
        model.train(training)
    return dense, found


@torch.no_grad()
def _pruned_losses(model: nn.Module, weight: Tensor, data: Sequence[Batch], levels: Sequence[float]) -> list[float]:
    before = weight.clone()
    losses = []
    try:
        for level in levels:
            (kept,), _ = keep_highest([before.abs().float()], kept_count(weight.numel(), level))
            weight.copy_(torch.where(kept, before, 0.0))
            losses.append(mean_loss(model, data))
    finally:
        weight.copy_(before)
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, data: Iterable[Batch]) -> float:
    """Return the mean of the losses of batches, each counted by its rows."""
    total, rows = 0.0, 0
    for batch in data:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise SparsityError(
                "the model returned no loss, which sensitivity is about; are there labels in the batch?"
            )
        size = len(batch["labels"])
        total, rows = total + float(loss) * size, rows + size
    return total / rows


def sensitivity(
    name: str, section: DataSection, levels: Sequence[float], batch: int = 16, revision: str = "main"
) -> Sensitivity:
    """Load a model and its tokenizer, and measure its layers and heads on the texts of a file.

    Args:
        name: folder or Hub name.
        section: whose training texts are read.
        levels: sparsities, ascending.
        batch: texts at once; one at a time where the model writes texts.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if model or data cannot be loaded, or a number is out of its range.
    """
    if batch < 1:
        raise RecipeError(f"batch is a whole number of texts above 0, not {batch}")
    model, tokenizer = load_whole(name, revision), load_tokenizer(name, revision)
    rows = load_split(section, "train")
    data = list(LabelledBatches(model, tokenizer, rows, section, batch))
    layers = match_layers(model, None)
    dense, losses = layer_losses(model, layers, data, levels)
    attentions = [block.name for block in known_sub_blocks(model) if block.kind == "attention"]
    heads = HeadTable(tuple(attentions), head_importance(model, data), len(rows)) if attentions else None
    shapes = {layer: (module.out_features, module.in_features) for layer, module in layers.items()}
    return Sensitivity(tuple(levels), dense, losses, shapes, heads, len(rows))


def as_recipe(groups: list[dict[str, Any]]) -> str:
    """Return groups as the YAML of a recipe's sparsity section."""
    return dump_yaml({"sparsity": {"groups": groups}})
