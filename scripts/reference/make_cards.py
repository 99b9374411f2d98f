"""Write the cards of the reference results into model_cards/, from the committed result file alone.

    python scripts/reference/make_cards.py [--output model_cards]

All figures come from recipes/reference/results.json. The same file gives the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_sparse.analysis.results import Result, by_name, dense_baseline
from hf_sparse.hf.hub.model_card import CardFacts, card_text
from hf_sparse.profiling.speed_record import Speed
from hf_sparse.utils.strict_yaml import dump_yaml
from scripts.reference.reference import ROOT, reference_results

DATA = {
    "sst2": "SST-2, validation sentences",
    "mrpc": "MRPC, validation pairs",
    "rte": "RTE, validation pairs",
    "stsb": "STS-B, validation pairs",
    "g2p": "CMUdict, held-out words, spelled in phonemes",
}
SEQ2SEQ = ("g2p",)
"""Tasks whose model generates text."""


def cards() -> dict[str, str]:
    """Return the text of every card by the name of its file."""
    results = reference_results()
    out = {"template.md": card_text(CardFacts("name of the model"))}
    for name, runs in by_name(results).items():
        out[f"{name}.md"] = card_text(_facts(runs, dense_baseline(results, runs[0])))
    return out


def mean(runs: Sequence[Result]) -> dict[str, float]:
    """Return the mean of each metric over seeds."""
    return {key: statistics.mean(run.metrics[key] for run in runs) for key in (runs[0].metrics if runs else ())}


def _facts(runs: Sequence[Result], dense: Sequence[Result]) -> CardFacts:
    first = runs[0]
    each = "; ".join(
        f"seed {run.seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in run.metrics.items()) for run in runs
    )
    count = "from one seed" if len(runs) == 1 else f"means over {len(runs)} seeds"
    sentences = [
        f"Result of a method ({first.how.description}), not a published model: this card comes without weights.",
        f"Metrics are {count}: {each}.",
        f"Dense baseline: {', '.join(sorted({run.name for run in dense})) or 'not run'}, seeds: {len(dense)}."
        if first.sparsity
        else "",
        f"{first.steps:,} steps." if first.steps else "",
        f"The run {first.note}." if first.note and first.note.startswith("starts") else f"{first.note or ''}",
    ]
    recipe = {**first.settings} if first.settings else None
    return CardFacts(
        title=first.name,
        architecture="T5ForConditionalGeneration" if first.task in SEQ2SEQ else "BertForSequenceClassification",
        base_model=first.model,
        data=DATA[first.task],
        metrics=mean(runs),
        dense_metrics=mean(dense),
        groups=_groups(runs) if first.sparsity else (),
        sizes=_sizes(runs),
        speed=next((Speed.from_dict(run.speed) for run in runs if run.speed), None),
        recipe=dump_yaml(recipe) if recipe else None,
        note=" ".join(sentence for sentence in sentences if sentence),
        loads=False,
        pruned=first.sparsity > 0,
    )


def _groups(runs: Sequence[Result]) -> list[tuple[str, int, float]]:
    reached = [run.reached for run in runs if run.reached is not None]
    requested = [("targeted weights, requested", 0, runs[0].sparsity)]
    return requested + ([("targeted weights, reached", 0, statistics.mean(reached))] if reached else [])


def _sizes(runs: Sequence[Result]) -> list[tuple[str, str]]:
    out = []
    for name, key in (("weight files", "bytes"), ("weight files after compaction", "compact_bytes")):
        sizes = [size for run in runs if (size := getattr(run, key)) is not None]
        out += [(name, f"{statistics.mean(sizes) / 1e6:.2f} MB")] if sizes else []
    return out


def main() -> None:
    """Write the cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    written = cards()
    for name, text in written.items():
        (output / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(written)} cards in {output}")


if __name__ == "__main__":
    main()
