"""The report of a saved model as one HTML page: what was removed, where, and what it did to size and results."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..formats.inspection import inspect
from ..formats.structure import Cut
from ..hf.auto import load_whole
from ..hf.trainer.evaluation import measured
from ..modeling.architectures import SubBlock, known_sub_blocks
from ..profiling.speed_record import SPEED, read_speed
from ..pruning.compaction import edits_of
from ..pruning.summary import summarize
from ..recipe.sections import DataSection
from ..reporting import html as page
from ..utils.atomic_io import read_json, write_text
from ..utils.validation import is_number
from .robustness import stress

BINS = 40
MAP_SIDE = 64
BUCKETS = 48


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    bench: str | os.PathLike[str] | None = None,
    data: DataSection | None = None,
) -> None:
    """Write the page.

    Args:
        folder: a saved model; what `hf-sparse train` left beside it is shown too.
        output: the HTML file.
        against: the dense model.
        bench: JSON that `hf-sparse bench` wrote; None = what lies beside the model, if there is some.
        data: texts (its `train`) for what pruning changed; needs `against`.

    Raises:
        RecipeError: if a model or a file cannot be read, or `data` comes without `against`.
        CheckpointError: if a model is packed, and damaged, or the timings are none.
    """
    if data is not None and against is None:
        raise RecipeError("--data shows what pruning changed, which needs the dense model: add --against DENSE_DIR")
    if not Path(output).absolute().parent.is_dir():  # now, not when all is measured
        raise RecipeError(f"cannot write the page {os.fspath(output)}: there is no folder {Path(output).parent}")
    folder = Path(folder)
    model = load_whole(str(folder))
    dense = None if against is None else load_whole(str(against))
    parts = [
        _sizes(folder, None if against is None else Path(against)),
        _speed(folder, bench),
        *_layers(model, dense),
        _training(folder),
    ]
    if data is not None:
        parts += stress(str(folder), model, str(against), dense, data).sections()
    else:
        parts.append(
            page.left_out("What pruning changed", "it is of classifiers, and needs --against DENSE_DIR and --data FILE")
        )
    text = page.page(f"Report of {folder.resolve().name}", parts)
    try:
        write_text(output, text)
    except OSError as error:
        raise RecipeError(f"cannot write the page {os.fspath(output)}: {error}") from error


def _sizes(folder: Path, against: Path | None) -> str:
    rows, bytes_ = [], []
    for path in (folder, against):
        if path is None:
            continue
        found = inspect(path)
        size, total = sum(found.files.values()), sum(t.parameters for t in found.tensors)
        bytes_.append(size)
        left = sum(t.nonzeros for t in found.tensors)
        rows.append([path.resolve().name, f"{total:,}", f"{left:,}", f"{size / 1e6:.2f} MB", *_metrics(path)])
    wide = max(len(row) for row in rows)
    head = ["model", "parameters", "nonzeros", "files", *(["measured"] if wide > 4 else [])]
    note = f"The files are {bytes_[0] / bytes_[1]:.3f} of the dense ones." if len(bytes_) == 2 else ""
    return page.section("Size", page.table(head, [row + ["-"] * (len(head) - len(row)) for row in rows]), note)


def _metrics(folder: Path) -> list[str]:
    found = read_json(folder / "eval_results.json") or {}
    values = [f"{key} {value:.4f}" for key, value in measured(found).items() if is_number(value)]
    return [", ".join(values)] if values else []


def _speed(folder: Path, bench: str | os.PathLike[str] | None) -> str:
    path = Path(bench) if bench is not None else folder / SPEED
    if bench is None and not path.is_file():
        why = "no timings were given (--bench FILE), and none lie beside the model (`hf-sparse bench DIR --save`)"
        return page.left_out("Speed", why)
    found = read_speed(path)
    note = f"{found.model}: medians and quartiles of a forward pass, measured in turns."
    return page.section("Speed", page.table(("", "measured"), found.rows), note)


def _layers(model: PreTrainedModel, dense: PreTrainedModel | None) -> list[str]:
    """Return the sections on weights: sparsity, heads, neurons, maps, histograms."""
    summary = summarize(model)
    short = _shortened([weight.name for weight in summary.weights])
    rows = [(short[weight.name], weight.sparsity) for weight in summary.weights]
    note = f"{summary.sparsity:.2%} of {summary.parameters:,} targeted weights are zero."
    parts = [page.section("Sparsity per layer", page.bars(rows), note)]
    parts += _groups(model)
    cards, values = [], dict(model.named_parameters())
    before = {} if dense is None else dict(dense.named_parameters())
    for weight in summary.weights:
        tensor = values[weight.name].detach().float()
        if not tensor.numel():
            continue
        caption = f"{short[weight.name]}, {' x '.join(map(str, weight.shape))}, {weight.sparsity:.1%} zeros"
        kept = page.bitmap(shrink((tensor != 0).float()), f"kept weights of {weight.name}")
        other = before.get(weight.name)
        cards.append(page.figure(kept + _histogram(tensor, other), caption))
    if not cards:
        return [*parts, page.left_out("Weights", "there are no targeted weights left")]
    line = " The line over it is the dense model's." if dense is not None else ""
    note = (
        f"Above, where weights are left: white is removed, blue is kept, at most {MAP_SIDE} dots to a side, each the "
        f"mean of the weights under it. Below, how many of those left have which value.{line}"
    )
    return [*parts, page.section("Weights", f'<div class="grid small">{"".join(cards)}</div>', note)]


def _shortened(names: list[str]) -> dict[str, str]:
    """Return the names without what all of them begin with, and without `.weight`."""
    parts = [name.split(".") for name in names]
    cut = 0
    while len(names) > 1 and all(len(part) > cut + 2 and part[cut] == parts[0][cut] for part in parts):
        cut += 1
    return {name: ".".join(part[cut:]).removesuffix(".weight") for name, part in zip(names, parts, strict=True)}


def shrink(values: Tensor) -> Tensor:
    """Return a matrix with at most `MAP_SIDE` entries to a side, each the mean of those it stands for."""
    rows, columns = values.shape
    scale = max(1.0, max(rows, columns) / MAP_SIDE)
    size = (max(1, round(rows / scale)), max(1, round(columns / scale)))
    return F.adaptive_avg_pool2d(values[None, None], size)[0, 0]


def _histogram(tensor: Tensor, other: Tensor | None) -> str:
    left = tensor[tensor != 0]
    before = None if other is None else other.detach().float()
    before = None if before is None else before[before != 0]
    both = [values.abs().max().item() for values in (left, before) if values is not None and values.numel()]
    limit = max(both, default=0.0)
    if not left.numel() or not math.isfinite(limit):
        return '<p class="left-out">No histogram: no weight is left, or some are not finite.</p>'
    counts = [torch.histc(v, BINS, -limit, limit).long().tolist() for v in (left, before) if v is not None]
    return page.histogram(counts[0], counts[1] if len(counts) > 1 else None, limit)


@dataclasses.dataclass(frozen=True)
class GroupsLeft:
    """How much is left of each head or neuron of a sub-block, as fractions; 0 = removed."""

    name: str
    kind: str
    left: Tensor


def groups_left(model: PreTrainedModel) -> list[GroupsLeft]:
    """Return for each head and neuron the fraction of its weights that are not zero, those cut out too (as 0).

    Shapes: `left` has one entry for each head or neuron that the model was made with.
    """
    edits = edits_of(model)
    out = []
    for block in known_sub_blocks(model):
        cuts = edits.heads if block.kind == "attention" else edits.neurons
        cut = cuts.get(block.name, Cut.of(block.groups))
        left = torch.zeros(cut.before)
        left[list(cut.kept)] = _fractions(block)
        out.append(GroupsLeft(block.name, block.kind, left))
    return out


def _fractions(block: SubBlock) -> Tensor:
    if not block.groups:
        return torch.zeros(0)
    parts = [layer.weight.detach().view(block.groups, -1) for layer in block.inputs.values()]
    parts.append(block.output.weight.detach().T.reshape(block.groups, -1))
    return torch.cat(parts, 1).ne(0).float().mean(1)


def _groups(model: PreTrainedModel) -> list[str]:
    found = groups_left(model)
    parts = []
    for kind, title in (("attention", "Heads left"), ("feed_forward", "Neurons left")):
        blocks = [block for block in found if block.kind == kind]
        if not blocks:
            parts.append(page.left_out(title, "no family of architectures that hf_sparse knows has such parts here"))
            continue
        rows, fine = [], kind == "attention"
        for block in blocks:
            alive, total = int(block.left.gt(0).sum()), len(block.left)
            cells = block.left if fine else _buckets(block.left)
            rows.append((f"{block.name}: {alive} of {total}", cells.tolist()))
        note = "One cell is one head, numbered from 0 at the left" if fine else "One cell is a run of neighbours"
        body = page.heat(rows, "heads" if fine else "")
        parts.append(page.section(title, body, f"{note}; its shade is the fraction of its weights that is left."))
    return parts


def _buckets(left: Tensor) -> Tensor:
    return F.adaptive_avg_pool1d(left[None, None], min(BUCKETS, len(left)))[0, 0]


def _training(folder: Path) -> str:
    state = read_json(folder / "trainer_state.json")
    title = "Over training"
    if state is None or not isinstance(state.get("log_history"), list):
        return page.left_out(title, "there is no trainer_state.json beside the model")
    series: dict[str, dict[float, float]] = {}
    for row in state["log_history"]:
        if not isinstance(row, Mapping) or not is_number(row.get("step")):
            continue
        for key, value in row.items():
            wanted = key in ("sparsity", "loss") or bool(measured({key: value}))
            if wanted and is_number(value):
                series.setdefault(str(key), {})[row["step"]] = value
    names = {"loss": "training loss"}
    charts = [
        page.figure(
            page.line_chart(sorted(points.items()), "step", key),
            names.get(key, key.replace("eval_", "validation ", 1)),
        )
        for key, points in sorted(series.items(), key=lambda item: item[0] != "sparsity")
        if len(points) > 1
    ]
    if not charts:
        return page.left_out(title, "trainer_state.json has no value at two or more steps")
    return page.section(title, f'<div class="grid">{"".join(charts)}</div>')
