"""How important the attention heads of a saved model are for its task: a table and a picture, measured on data."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from .architectures import find_sub_blocks
from .data import load_split
from .errors import BackendError, RecipeError
from .importance import head_importance
from .loading import load_tokenizer, load_whole
from .recipe_sections import DataSection


@dataclasses.dataclass(frozen=True)
class HeadTable:
    """The importance of each head. `print` it for a table.

    Args:
        names: of the attentions, one for each row.
        importance: see `hf_sparse.importance.head_importance`; NaN = not there.
        samples: how many texts it was measured on.

    Shapes: importance `(attentions, heads)`.
    """

    names: tuple[str, ...]
    importance: Tensor
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a head that is not there is null."""
        rows = {
            name: [None if math.isnan(value) else value for value in row]
            for name, row in zip(self.names, self.importance.tolist(), strict=True)
        }
        return {"samples": self.samples, "importance": rows}

    def __str__(self) -> str:
        highest = max((value for value in self.importance.flatten().tolist() if not math.isnan(value)), default=0.0)
        scale = highest or 1.0
        wide = max(len(name) for name in (*self.names, "attention"))
        lines = [f"{'attention':<{wide}}  " + " ".join(f"{head:>5}" for head in range(self.importance.shape[1]))]
        for name, row in zip(self.names, self.importance.tolist(), strict=True):
            cells = ["    -" if math.isnan(value) else f"{value / scale:>5.2f}" for value in row]
            lines.append(f"{name:<{wide}}  " + " ".join(cells))
        lines.append(f"1.00 is {highest:.3g}, the mean of |dL/dxi| over {self.samples} texts (Michel et al. 2019)")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a heatmap, layers by heads, and write it to a file (png, pdf or svg by its ending).

        Raises:
            BackendError: without matplotlib.
            RecipeError: for an ending that matplotlib cannot write.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BackendError("drawing needs matplotlib: pip install matplotlib") from error
        rows, columns = self.importance.shape
        longest = max(len(name) for name in self.names)
        figure = Figure(figsize=(2.2 + 0.075 * longest + 0.38 * columns, 1.6 + 0.32 * rows), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(self.importance.numpy(), cmap="viridis", vmin=0.0, aspect="auto")
        axes.set_facecolor("lightgrey")  # heads that are not there
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows), self.names, fontsize=8)
        axes.set_xlabel("head")
        axes.set_title(f"Importance of heads, {self.samples} texts", fontsize=10)
        figure.colorbar(image, ax=axes, label="mean of |dL/dxi|")
        try:
            figure.savefig(path, dpi=150)
        except (ValueError, OSError) as error:
            raise RecipeError(f"cannot write the picture {os.fspath(path)}: {error}") from error


def heads(name: str, section: DataSection, batch: int = 16, revision: str = "main") -> HeadTable:
    """Load a model and its tokenizer, and measure its heads on the texts of a file.

    Args:
        name: folder or Hub name.
        section: whose training texts are read.
        batch: texts at once; one at a time where the model writes texts, as each has its own number of tokens.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if model or data cannot be loaded, a label is none of the model's, or batch is below 1.
        PatternError: if no architecture knows the model.
    """
    if batch < 1:
        raise RecipeError(f"batch is a whole number of texts above 0, not {batch}")
    model = load_whole(name, revision)
    blocks = [block for block in find_sub_blocks(model, "head importance") if block.kind == "attention"]
    tokenizer = load_tokenizer(name, revision)
    rows = load_split(section, "train")
    found = head_importance(model, batches(model, tokenizer, rows, section, batch))
    return HeadTable(tuple(block.name for block in blocks), found, len(rows))


def batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, section: DataSection, batch: int
) -> Iterator[dict[str, Any]]:
    """Yield the texts of a file as inputs of a model with labels; one at a time where the model writes texts."""
    writes = bool(model.config.is_encoder_decoder)
    collate = DataCollatorForSeq2Seq(tokenizer, model) if writes else DataCollatorWithPadding(tokenizer)
    size = 1 if writes else batch
    for start in tqdm(range(0, len(rows), size), desc="Texts"):
        texts = rows[start : start + size]
        tokens = tokenizer(
            *(texts[column] for column in section.text_columns), truncation=True, max_length=section.max_length
        )
        if writes:
            written = [str(text) for text in texts["labels"]]
            length = section.max_target_length or section.max_length
            labels: Any = tokenizer(text_target=written, truncation=True, max_length=length)["input_ids"]
        else:
            labels = [label_number(model, value, start + place) for place, value in enumerate(texts["labels"])]
        features = [
            {**{key: values[place] for key, values in tokens.items()}, "labels": labels[place]}
            for place in range(len(labels))
        ]
        yield {key: value.to(model.device) for key, value in collate(features).items() if isinstance(value, Tensor)}


def label_number(model: PreTrainedModel, value: Any, row: int) -> int | float:
    """Return a label as the model counts it.

    Raises:
        RecipeError: if the model does not know it.
    """
    if model.config.num_labels == 1 and isinstance(value, (int, float)):
        return float(value)
    known: dict[str, Any] = dict(model.config.label2id or {})
    if str(value) in known:
        return int(known[str(value)])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < int(model.config.num_labels or 0):
        return value
    raise RecipeError(f"row {row} of the data has label {value!r}, but the model knows {', '.join(map(str, known))}")
