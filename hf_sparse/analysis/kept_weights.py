"""Which weights, heads and neurons of a model are kept: maps and histograms for its report."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..formats.structure import Cut
from ..modeling.architectures import SubBlock, known_filters, known_sub_blocks
from ..modeling.layer_kinds import Slot
from ..pruning.compaction import edits_of
from ..pruning.summary import summarize
from ..reporting import html
from ..reporting.charts import histogram, mask_image

BINS = 40
MAP_SIDE = 64
BUCKETS = 48


@dataclasses.dataclass(frozen=True)
class KeptGroups:
    """The fraction of nonzero weights of each head, neuron or filter of a sub-block; 0 = pruned."""

    name: str
    kind: str
    kept: Tensor


def kept_groups(model: PreTrainedModel) -> list[KeptGroups]:
    """Return for each head, neuron and filter the fraction of its weights that are not zero; 0 for removed ones.

    Shapes: `kept` has one entry for each head, neuron or filter of the original architecture.
    """
    edits = edits_of(model)
    out = []
    for block in known_sub_blocks(model):
        cuts = edits.heads if block.kind == "attention" else edits.neurons
        cut = cuts.get(block.name, Cut.of(block.groups))
        kept = torch.zeros(cut.before)
        kept[list(cut.kept)] = _fractions(block)
        out.append(KeptGroups(block.name, block.kind, kept))
    for row in known_filters(model):
        cut = edits.filters.get(row.name, Cut.of(row.groups))
        kept = torch.zeros(cut.before)
        kept[list(cut.kept)] = row.module.weight.detach().flatten(1).ne(0).float().mean(1).cpu()
        out.append(KeptGroups(row.name, row.kind, kept))
    return out


def _fractions(block: SubBlock) -> Tensor:
    if not block.groups:
        return torch.zeros(0)
    # KV heads that several heads read belong to none of them.
    own = [part for part in (*block.parts, block.exit) if not part.shared]
    return torch.cat([part.weights().flatten(1) for part in own], 1).ne(0).float().mean(1)


def weight_sections(model: PreTrainedModel, dense: PreTrainedModel | None) -> list[html.Section]:
    """Return the sections on weights: sparsity, heads, neurons, maps, histograms.

    Args:
        dense: the baseline whose histograms are drawn too; None = there is none.
    """
    summary = summarize(model)
    short = _without_common_prefix([weight.name for weight in summary.weights])
    rows = [(short[weight.name], weight.sparsity) for weight in summary.weights]
    note = f"{summary.sparsity:.2%} of {summary.parameters:,} targeted weights are zero."
    sections = [html.Section("Sparsity per layer", [html.Bars(rows)], note), *_group_sections(model)]
    figures, values = [], dict(model.named_parameters())
    baseline = {} if dense is None else dict(dense.named_parameters())
    for weight in summary.weights:
        tensor = values[weight.name].detach().float().cpu()
        if tensor.numel():
            caption = f"{short[weight.name]}, {' x '.join(map(str, weight.shape))}, {weight.sparsity:.1%} zeros"
            matrix = Slot.of(model, weight.name).view.to_matrix(tensor)
            figures.append(_figure(weight.name, caption, matrix, baseline.get(weight.name)))
    if not figures:
        return [*sections, html.Section("Weights", omitted="the model has no targeted weights")]
    line = " The line is the dense baseline." if dense is not None else ""
    note = (
        f"Map: pruned weights are white, kept ones blue; at most {MAP_SIDE} pixels per side, each the mean of the "
        f"weights under it. Histogram: values of the kept weights.{line}"
    )
    return [*sections, html.Section("Weights", [html.Figures(figures, small=True)], note)]


def _figure(name: str, caption: str, tensor: Tensor, baseline: Tensor | None) -> html.Figure:
    image = mask_image(shrink((tensor != 0).float()), f"kept weights of {name}")
    before = None if baseline is None else baseline.detach().float().cpu()
    parts = [values[values != 0] for values in (tensor, before) if values is not None]
    limit = max((part.abs().max().item() for part in parts if part.numel()), default=0.0)
    if not parts[0].numel() or not math.isfinite(limit):
        return html.Figure(caption, [image], omitted="No histogram: no weight is kept, or some are not finite.")
    counts = [torch.histc(part, BINS, -limit, limit).long().tolist() for part in parts]
    chart = histogram(counts[0], counts[1] if len(counts) > 1 else None, limit, f"histogram of {name}")
    return html.Figure(caption, [image], [chart])


def _group_sections(model: PreTrainedModel) -> list[html.Section]:
    groups = kept_groups(model)
    sections = []
    kinds = {"attention": "Kept heads", "feed_forward": "Kept neurons", "convolution": "Kept filters"}
    for kind, title in kinds.items():
        blocks = [block for block in groups if block.kind == kind]
        if not blocks:
            if not groups and kind != "convolution":
                sections.append(html.Section(title, omitted="the architecture of this model is not known to hf_sparse"))
            continue
        rows, single = [], kind == "attention"
        for block in blocks:
            alive, total = int(block.kept.gt(0).sum()), len(block.kept)
            cells = block.kept if single else _buckets(block.kept)
            rows.append((f"{block.name}: {alive} of {total}", cells.tolist()))
        several = f"One cell is a run of neighboring {title.removeprefix('Kept ')}"
        note = "One cell is one head, from 0 at the left" if single else several
        note += "; its shade is the fraction of its weights that are kept."
        sections.append(html.Section(title, [html.Heatmap(rows, separated=single)], note))
    return sections


def _buckets(kept: Tensor) -> Tensor:
    return F.adaptive_avg_pool1d(kept[None, None], min(BUCKETS, len(kept)))[0, 0]


def _without_common_prefix(names: list[str]) -> dict[str, str]:
    """Return the names without what all of them begin with, and without `.weight`."""
    parts = [name.split(".") for name in names]
    cut = 0
    while len(names) > 1 and all(len(part) > cut + 2 and part[cut] == parts[0][cut] for part in parts):
        cut += 1
    return {name: ".".join(part[cut:]).removesuffix(".weight") for name, part in zip(names, parts, strict=True)}


def shrink(values: Tensor) -> Tensor:
    """Return a matrix with at most `MAP_SIDE` entries to a side, each the mean of those under it."""
    rows, columns = values.shape
    scale = max(1.0, max(rows, columns) / MAP_SIDE)
    size = (max(1, round(rows / scale)), max(1, round(columns / scale)))
    return F.adaptive_avg_pool2d(values[None, None], size)[0, 0]
