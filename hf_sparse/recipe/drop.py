"""Removing whole layers or experts of a saved causal language model: load, measure on a text, remove, save."""

from __future__ import annotations

import os

from ..errors import RecipeError
from ..hf.auto import is_causal, load_tokenizer, load_whole
from ..pruning.depth import Criterion, prune_layers, stack_of
from ..pruning.experts import prune_experts
from ..pruning.merging import merge_experts
from ..utils.validation import check_integer
from .prune import CalibrationText, computing_in_float32, save_model


def drop_saved(
    name: str,
    output: str | os.PathLike[str],
    text: CalibrationText,
    layers: int | None = None,
    criterion: Criterion = "cosine",
    experts: float | None = None,
    selection: str = "uniform",
    merge: bool = False,
    revision: str = "main",
) -> str:
    """Load a causal language model, remove the layers or experts that matter least on a text, and save it.

    Args:
        name: folder or Hub name.
        output: folder that is written.
        text: sequences to measure on.
        layers: how many to remove; None = none.
        criterion: see `layer_importance`.
        experts: fraction to remove; None = none.
        selection: see `prune_experts`.
        merge: merge experts that do alike (`merge_experts`) instead of dropping those that matter least.
        revision: branch, tag or commit on the Hub.

    Returns:
        The layers and experts that left, as text.

    Raises:
        RecipeError: if there is nothing to remove, or the model or the text cannot be loaded or do not fit.
        PatternError: if the model has no such parts.
    """
    if layers is None and experts is None:
        raise RecipeError("nothing was requested: name a number of layers, a fraction of the experts, or both")
    model = load_whole(name, revision)
    if not is_causal(model):
        raise RecipeError(f"'{name}' is a {type(model).__name__}, and a text measures causal language models alone")
    if layers is not None:
        check_integer("layers", layers, f"[0, {len(stack_of(model)[1])})")
    if merge and (experts is None or selection != "uniform"):
        raise RecipeError("experts are merged within each mixture: name a fraction of them, and no other selection")
    before, lines = model.num_parameters(), []
    with computing_in_float32(model):
        batches = text.batches(model, load_tokenizer(name, revision))
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        if experts is not None:  # the layers are then measured with the experts that are left
            edits = (
                merge_experts(model, batches, experts) if merge else prune_experts(model, batches, experts, selection)
            )
            lines += [f"{where}: {cut.count} of {cut.before} experts" for where, cut in edits.experts.items()]
        if layers is not None:
            removed = prune_layers(model, batches, layers, criterion)
            lines.append(f"layers removed: {', '.join(map(str, removed)) or 'none'}")
    save_model(model, name, output, revision)
    after = model.num_parameters()
    return "\n".join([*lines, f"{before:,} parameters before, {after:,} after ({after / before:.1%})"])
