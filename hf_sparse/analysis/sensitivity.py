"""Sensitivity of the loss to pruning one layer or one head alone, and sparsity allocations computed from it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..hf.auto import load_tokenizer, load_whole
from ..modeling.architectures import known_sub_blocks
from ..modeling.layer_kinds import matrix_shape
from ..modeling.layer_matching import match_layers
from ..pruning.head_importance import head_importance
from ..pruning.selection import kept_count
from ..recipe.data import load_split
from ..recipe.data_loader import LabelledBatches
from ..recipe.sections import DataSection
from ..reporting.plotting import new_figure, write_figure
from ..utils.strict_yaml import dump_yaml
from .ablation import head_losses, layer_losses
from .allocation import by_sensitivity, erdos_renyi, groups_of
from .head_table import HeadTable


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The loss by the sparsity of one layer, all others dense. `print` it for a table.

    Args:
        levels: sparsities, ascending.
        dense: loss of the unpruned model.
        losses: one for each level, by name of the layer.
        shapes: of the weights.
        heads: importance of the heads; None if the architecture is not supported.
        samples: number of examples it was measured on.
        masked: by attention, the loss with each head masked alone, and the loss at each level of heads masked together.
    """

    levels: tuple[float, ...]
    dense: float
    losses: dict[str, tuple[float, ...]]
    shapes: dict[str, tuple[int, int]]
    heads: HeadTable | None
    samples: int
    masked: dict[str, tuple[list[float], list[float]]] = dataclasses.field(default_factory=dict)

    def allocations(self, sparsity: float) -> dict[str, list[dict[str, Any]]]:
        """Return the groups of a recipe for a total sparsity, by allocation method."""
        sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
        increases = {name: [loss - self.dense for loss in losses] for name, losses in self.losses.items()}
        groups = {
            "sensitivity": groups_of(by_sensitivity(sizes, self.levels, increases, sparsity), sizes),
            "erdos_renyi": groups_of(erdos_renyi(self.shapes, sparsity), sizes),
        }
        numbers = {name: len(alone) for name, (alone, _) in self.masked.items()}
        if numbers and kept_count(sum(numbers.values()), sparsity) >= len(numbers):  # each attention keeps a head
            increases = {name: [loss - self.dense for loss in together] for name, (_, together) in self.masked.items()}
            heads = groups_of(by_sensitivity(numbers, self.levels, increases, sparsity), numbers)
            groups["heads"] = [{**group, "pattern": "head"} for group in heads]
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "levels": list(self.levels),
            "dense_loss": self.dense,
            "losses": {name: list(losses) for name, losses in self.losses.items()},
            "heads": None if self.heads is None else self.heads.to_dict(),
            "masked_heads": {
                name: {"alone": alone, "together": together} for name, (alone, together) in self.masked.items()
            },
            "samples": self.samples,
        }

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.losses, "layer"))
        lines = [f"{'layer':<{width}}  " + " ".join(f"{level:>9.1%}" for level in self.levels)]
        for name, losses in self.losses.items():
            lines.append(f"{name:<{width}}  " + " ".join(f"{loss - self.dense:>+9.4f}" for loss in losses))
        lines.append(f"Increase of the loss over the dense loss {self.dense:.4f}, on {self.samples} examples")
        if self.masked:
            lines += ["", *self._masked_lines()]
        return "\n".join(lines) + ("" if self.heads is None else f"\n\n{self.heads}")

    def _masked_lines(self) -> list[str]:
        width = max(len(name) for name in (*self.masked, "heads masked together"))
        lines = [f"{'heads masked together':<{width}}  " + " ".join(f"{level:>9.1%}" for level in self.levels)]
        for name, (_, together) in self.masked.items():
            lines.append(f"{name:<{width}}  " + " ".join(f"{loss - self.dense:>+9.4f}" for loss in together))
        most = max(len(alone) for alone, _ in self.masked.values())
        lines += ["", f"{'one head masked alone':<{width}}  " + " ".join(f"{head:>7}" for head in range(most))]
        for name, (alone, _) in self.masked.items():
            lines.append(f"{name:<{width}}  " + " ".join(f"{loss - self.dense:>+7.3f}" for loss in alone))
        return lines

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the loss over sparsity, one line for each layer, and write it to a file (png, pdf or svg by its ending).

        Raises:
            BackendError: without matplotlib.
            RecipeError: for an ending that matplotlib cannot write.
        """
        lines = {**self.losses, **{f"{name} (heads)": together for name, (_, together) in self.masked.items()}}
        figure = new_figure(9, max(4.0, 0.2 * len(lines)) + (2.2 if self.masked else 0.0))
        upper, *lower = figure.subplots(
            1 + bool(self.masked), squeeze=False, height_ratios=[2, 1] if self.masked else None
        )[:, 0]
        for index, (name, losses) in enumerate(lines.items()):
            style = ("-", "--", ":", "-.")[index // 10 % 4]  # matplotlib has ten colours
            marker = "o" if name in self.losses else "s"
            upper.plot((0.0, *self.levels), (self.dense, *losses), style, marker=marker, markersize=3, label=name)
        upper.set_xlabel("sparsity of this layer alone, or fraction of its heads masked")
        upper.set_ylabel("loss")
        upper.set_title(f"Sensitivity of layers and heads, {self.samples} examples", fontsize=10)
        for axes in lower:
            _draw_heads(figure, axes, self.masked, self.dense)
        figure.legend(loc="outside right upper", fontsize=7)
        write_figure(figure, path)


def _draw_heads(figure: Any, axes: Any, masked: Mapping[str, tuple[list[float], list[float]]], dense: float) -> None:
    most = max(len(alone) for alone, _ in masked.values())
    table = [[loss - dense for loss in alone] + [math.nan] * (most - len(alone)) for alone, _ in masked.values()]
    limit = max((abs(value) for row in table for value in row if not math.isnan(value)), default=0.0) or 1.0
    image = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_facecolor("lightgrey")  # pruned heads
    axes.set_xticks(range(most))
    axes.set_yticks(range(len(masked)), masked, fontsize=7)
    axes.set_xlabel("head masked alone")
    figure.colorbar(image, ax=axes, label="increase of the loss")


def sensitivity(
    name: str, section: DataSection, levels: Sequence[float], batch: int = 16, revision: str = "main"
) -> Sensitivity:
    """Load a model and its tokenizer, and measure its layers and heads on the examples of a file.

    Args:
        name: folder or Hub name.
        section: its training examples are read.
        levels: sparsities, ascending.
        batch: examples per batch; 1 for a model that generates text.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if model or data cannot be loaded, or a number is out of its range.
    """
    if batch < 1:
        raise RecipeError(f"`batch` must be a number of examples >= 1, got {batch}")
    model, tokenizer = load_whole(name, revision), load_tokenizer(name, revision)
    rows = load_split(section, "train")
    data = list(LabelledBatches(model, tokenizer, rows, section, batch))
    layers = match_layers(model, None)
    dense, losses = layer_losses(model, layers, data, levels)
    attentions = [block.name for block in known_sub_blocks(model) if block.kind == "attention"]
    heads = HeadTable(tuple(attentions), head_importance(model, data), len(rows)) if attentions else None
    shapes = {layer: matrix_shape(module) for layer, module in layers.items()}
    masked = head_losses(model, data, levels)
    return Sensitivity(tuple(levels), dense, losses, shapes, heads, len(rows), masked)


def as_recipe(groups: list[dict[str, Any]]) -> str:
    """Return groups as the YAML of a recipe's sparsity section."""
    return dump_yaml({"sparsity": {"groups": groups}})
