"""Importance of the attention heads of a saved model, measured on data: a table and a heatmap."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..hf.auto import load_tokenizer, load_whole
from ..modeling.architectures import find_sub_blocks
from ..pruning.head_importance import head_importance
from ..recipe.data import load_split
from ..recipe.data_loader import LabelledBatches
from ..recipe.sections import DataSection
from ..reporting.plotting import new_figure, write_figure


@dataclasses.dataclass(frozen=True)
class HeadTable:
    """The importance of each head. `print` it for a table.

    Args:
        names: of the attentions, one for each row.
        importance: see `hf_sparse.pruning.head_importance.head_importance`; NaN = pruned.
        samples: number of examples it was measured on.

    Shapes: importance `(attentions, heads)`.
    """

    names: tuple[str, ...]
    importance: Tensor
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a pruned head is null."""
        rows = {
            name: [None if math.isnan(value) else value for value in row]
            for name, row in zip(self.names, self.importance.tolist(), strict=True)
        }
        return {"samples": self.samples, "importance": rows}

    def __str__(self) -> str:
        highest = max((value for value in self.importance.flatten().tolist() if not math.isnan(value)), default=0.0)
        scale = highest or 1.0
        width = max(len(name) for name in (*self.names, "attention"))
        lines = [f"{'attention':<{width}}  " + " ".join(f"{head:>5}" for head in range(self.importance.shape[1]))]
        for name, row in zip(self.names, self.importance.tolist(), strict=True):
            cells = ["    -" if math.isnan(value) else f"{value / scale:>5.2f}" for value in row]
            lines.append(f"{name:<{width}}  " + " ".join(cells))
        lines.append(f"1.00 is {highest:.3g}, the mean of |dL/dxi| over {self.samples} examples (Michel et al. 2019)")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a heatmap, layers by heads, and write it to a file (png, pdf or svg by its ending).

        Raises:
            BackendError: without matplotlib.
            RecipeError: for an ending that matplotlib cannot write.
        """
        rows, columns = self.importance.shape
        longest = max(len(name) for name in self.names)
        figure = new_figure(2.2 + 0.075 * longest + 0.38 * columns, 1.6 + 0.32 * rows)
        axes = figure.subplots()
        image = axes.imshow(self.importance.numpy(), cmap="viridis", vmin=0.0, aspect="auto")
        axes.set_facecolor("lightgrey")  # pruned heads
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows), self.names, fontsize=8)
        axes.set_xlabel("head")
        axes.set_title(f"Importance of heads, {self.samples} examples", fontsize=10)
        figure.colorbar(image, ax=axes, label="mean of |dL/dxi|")
        write_figure(figure, path)


def heads(name: str, section: DataSection, batch: int = 16, revision: str = "main") -> HeadTable:
    """Load a model and its tokenizer, and measure its heads on the examples of a file.

    Args:
        name: folder or Hub name.
        section: its training examples are read.
        batch: examples per batch; 1 for a model that generates text, since sequence lengths differ.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if model or data cannot be loaded, the model does not have a label, or batch is below 1.
        PatternError: if the architecture is not supported.
    """
    model = load_whole(name, revision)
    blocks = [block for block in find_sub_blocks(model, "head importance") if block.kind == "attention"]
    tokenizer = load_tokenizer(name, revision)
    rows = load_split(section, "train")
    importance = head_importance(
        model, tqdm(LabelledBatches(model, tokenizer, rows, section, batch), desc="Head importance")
    )
    return HeadTable(tuple(block.name for block in blocks), importance, len(rows))
