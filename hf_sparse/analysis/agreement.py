"""How much the masks of several runs agree, against chance, and which heads and neurons all of them have kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import RecipeError
from ..formats.structure import KINDS
from ..hf.auto import load_whole
from ..modeling.architectures import known_sub_blocks
from ..modeling.layer_kinds import Slot, slots_of
from ..modeling.model_state import sparse_weights
from ..pruning.compaction import edits_of
from ..reporting import html
from ..utils.atomic_io import write_text


@dataclasses.dataclass(frozen=True)
class WeightAgreement:
    """One weight in all runs.

    Args:
        name: of the weight.
        densities: fraction that each run has kept.
        jaccard: entries that two runs both keep, as a fraction of those that either keeps; the mean over pairs of runs.
        chance: the same for random masks of these densities.
    """

    name: str
    densities: tuple[float, ...]
    jaccard: float
    chance: float

    @property
    def beyond_chance(self) -> float:
        """0 for random masks, 1 for equal ones; below 0 where runs avoid what the others keep."""
        return (self.jaccard - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0


@dataclasses.dataclass(frozen=True)
class GroupAgreement:
    """The heads or neurons of one sub-block in all runs.

    Args:
        kind: "heads" or "neurons".
        name: of the sub-block.
        total: how many there are in the model before pruning.
        kept: how many each run has kept.
        by_all: numbers of those that all runs have kept.
    """

    kind: str
    name: str
    total: int
    kept: tuple[int, ...]
    by_all: tuple[int, ...]

    @property
    def chance(self) -> float:
        """How many all runs would keep if each drew its own at random."""
        return self.total * math.prod(count / self.total for count in self.kept)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What several runs have in common. `print` it for tables.

    Args:
        runs: their names.
        weights: that were made sparse in all runs and have one shape.
        groups: sub-blocks of which some run has lost heads or neurons.
        left_out: weights that are not compared, as compaction has made their shapes different.
    """

    runs: tuple[str, ...]
    weights: tuple[WeightAgreement, ...]
    groups: tuple[GroupAgreement, ...]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        weights = [dataclasses.asdict(weight) | {"beyond_chance": weight.beyond_chance} for weight in self.weights]
        groups = [dataclasses.asdict(group) | {"chance": group.chance} for group in self.groups]
        return {"runs": list(self.runs), "weights": weights, "groups": groups, "left_out": list(self.left_out)}

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return title, head and rows of each table that has any."""
        weights = [
            [
                weight.name,
                " ".join(f"{density:.3f}" for density in weight.densities),
                f"{weight.jaccard:.3f}",
                f"{weight.chance:.3f}",
                f"{weight.beyond_chance:.3f}",
            ]
            for weight in self.weights
        ]
        if weights:
            means = [
                statistics.mean(getattr(w, key) for w in self.weights) for key in ("jaccard", "chance", "beyond_chance")
            ]
            weights.append(["mean", "", *(f"{value:.3f}" for value in means)])
        found = [("Masks", ["weight", "kept by each", "Jaccard", "by chance", "beyond chance"], weights)]
        for kind in ("heads", "neurons"):
            groups = [group for group in self.groups if group.kind == kind]
            rows = [
                [
                    group.name,
                    str(group.total),
                    " ".join(map(str, group.kept)),
                    str(len(group.by_all)),
                    f"{group.chance:.1f}",
                    _listed(group.by_all) if kind == "heads" else "",
                ]
                for group in groups
            ]
            head = ["sub-block", kind, "kept by each", "kept by all", "by chance", "which"]
            if kind == "neurons":
                head, rows = head[:-1], [row[:-1] for row in rows]
            found.append((kind.capitalize(), head, rows))
        return [table for table in found if table[2]]

    def __str__(self) -> str:
        lines = [f"runs: {', '.join(self.runs)}"]
        for title, head, rows in self.tables():
            widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
            lines += ["", title]
            lines += [
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
            ]
        if self.left_out:
            lines += ["", _left_out(self.left_out)]
        return "\n".join(lines)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write an HTML page.

        Raises:
            RecipeError: if it cannot be written.
        """
        intro = (
            "Jaccard is what two runs both keep, as a fraction of what either keeps, averaged over all pairs. By "
            "chance it is that of random masks as dense as these. Beyond chance is 0 for them, and 1 for equal masks."
        )
        bars = html.Bars([(weight.name, weight.beyond_chance) for weight in self.weights])
        sections = []
        for title, head, rows in self.tables():
            parts: list[Any] = [html.Table(head, rows)]
            if title == "Masks":
                parts.insert(0, bars)
            note = intro if title == "Masks" else ""
            sections.append(html.Section(title, parts, note))
        if self.left_out:
            sections.append(html.Section("Not compared", omitted=_left_out(self.left_out)))
        try:
            write_text(path, html.render(f"Agreement of {', '.join(self.runs)}", sections))
        except OSError as error:
            raise RecipeError(f"cannot write {os.fspath(path)}: {error}") from error


def _left_out(names: Sequence[str]) -> str:
    return (
        f"{len(names)} weights (first: {names[0]}) have different shapes in the runs, since compaction removed other "
        "parts of them; the tables of heads and neurons count what is left."
    )


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) or "none"


def expected_jaccard(first: float, second: float) -> float:
    """Return the Jaccard index of random masks: what both keep over what either keeps, in expectation of large weights.

    Example:
        >>> expected_jaccard(0.5, 0.5)  # a quarter over three quarters
        0.3333333333333333
    """
    both = first * second
    either = first + second - both
    return both / either if either else 1.0


def agreement(folders: Sequence[str | os.PathLike[str]]) -> Agreement:
    """Compare the zeros of saved models of one architecture.

    Args:
        folders: two or more.

    Raises:
        RecipeError: for fewer than two, for models that cannot be loaded, or that have no sparse weight in common.
    """
    if len(folders) < 2:
        raise RecipeError(f"agreement is between runs: give two or more folders, got {len(folders)}")
    masks: list[dict[str, Tensor]] = []
    groups: list[dict[tuple[str, str], tuple[int, tuple[int, ...]]]] = []
    for folder in tqdm(folders, desc="Reading masks", disable=None):
        model = load_whole(os.fspath(folder))
        masks.append(_masks(model))
        groups.append(_kept_groups(model))
    common = [name for name in masks[0] if all(name in other for other in masks)]
    left_out = tuple(name for name in common if len({each[name].shape for each in masks}) > 1)
    names = [name for name in common if name not in left_out]
    lost = _group_agreements(groups)
    if not names and not lost:
        listed = ", ".join(str(folder) for folder in folders)
        raise RecipeError(
            f"{listed} have no sparse weight and no removed head or neuron in common. Compare runs of one model, "
            "pruned with the same targets"
        )
    labels = _labels(folders)
    return Agreement(labels, tuple(_weight(name, [each[name] for each in masks]) for name in names), lost, left_out)


def _labels(folders: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    short = [Path(folder).resolve().name for folder in folders]
    return tuple(short if len(set(short)) == len(short) else [os.fspath(folder) for folder in folders])


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """Return which entries are kept, of the weights that are meant to be sparse and of others with as many zeros."""
    meant = sparse_weights(model)
    slots = {slot.name(path): slot for path, module in model.named_modules() for slot in slots_of(module)}
    slots |= {name: Slot.of(model, name) for name in meant if name not in slots}  # embeddings
    found = {}
    for name, slot in slots.items():
        kept = slot.tensor.detach() != 0
        if kept.numel() and (name in meant or int(kept.sum()) < 0.9 * kept.numel()):
            found[name] = kept
    return found


def _kept_groups(model: nn.Module) -> dict[tuple[str, str], tuple[int, tuple[int, ...]]]:
    """Return how many heads or neurons each sub-block had, and the numbers of those that are left."""
    edits, found = edits_of(model), {}
    for block in known_sub_blocks(model):
        kind = KINDS[block.kind]
        cut = getattr(edits, kind).get(block.name)
        numbers = cut.kept if cut is not None else tuple(range(block.groups))
        total = cut.before if cut is not None else block.groups
        living = (block.exit.weights() != 0).flatten(1).any(1).tolist() if block.groups else []
        found[kind, block.name] = (total, tuple(n for n, alive in zip(numbers, living, strict=True) if alive))
    return found


def _group_agreements(
    runs: Sequence[dict[tuple[str, str], tuple[int, tuple[int, ...]]]],
) -> tuple[GroupAgreement, ...]:
    found = []
    for key, (total, _) in runs[0].items():
        if not total or not all(key in run and run[key][0] == total for run in runs):
            continue
        kept = [run[key][1] for run in runs]
        if all(len(numbers) == total for numbers in kept):
            continue
        by_all = set(kept[0]).intersection(*kept[1:])
        found.append(GroupAgreement(*key, total, tuple(map(len, kept)), tuple(sorted(by_all))))
    return tuple(found)


@torch.no_grad()
def _weight(name: str, masks: Sequence[Tensor]) -> WeightAgreement:
    densities = tuple(float(mask.double().mean()) for mask in masks)
    pairs = list(itertools.combinations(range(len(masks)), 2))
    found = []
    for one, two in pairs:
        either = int((masks[one] | masks[two]).sum())
        found.append(int((masks[one] & masks[two]).sum()) / either if either else 1.0)
    chance = [expected_jaccard(densities[one], densities[two]) for one, two in pairs]
    return WeightAgreement(name, densities, statistics.mean(found), statistics.mean(chance))
