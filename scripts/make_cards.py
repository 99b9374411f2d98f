"""Write the cards of the reference results into model_cards/, from the committed result files and recipes alone.

    python scripts/make_cards.py [--output model_cards]

Every figure is read from recipes/sst2_results.json; none is typed. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from hf_sparse.model_card import CardFacts, card_text, read_recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "recipes" / "sst2_results.json"
RECIPES = {"dense", "magnitude", "movement", "soft_movement"}
HEADS = {"movement, half of heads and neurons": "sst2_heads_neurons"}
"""Results whose recipe is not named after the method. Of those that are in neither, no recipe is committed."""


def cards() -> dict[str, str]:
    """Return the text of every card by the name of its file."""
    runs: dict[tuple[str, float], dict[int, float]] = {}
    for run in json.loads(RESULTS.read_text(encoding="utf-8")):
        runs.setdefault((run["method"], run["sparsity"]), {})[run["seed"]] = run["accuracy"]
    made = {"template.md": card_text(CardFacts("name of the model"))}
    for (method, sparsity), seeds in runs.items():
        slug = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
        name = f"sst2-{slug}" + (f"-{sparsity * 100:g}" if sparsity else "")
        made[f"{name}.md"] = card_text(_facts(name, method, sparsity, seeds, runs["dense", 0.0]))
    return made


def _facts(name: str, method: str, sparsity: float, seeds: dict[int, float], dense: dict[int, float]) -> CardFacts:
    stem = f"sst2_{method}" if method in RECIPES else HEADS.get(method)
    recipe = read_recipe(ROOT / "recipes" / f"{stem}.yaml") if stem else None
    if recipe and method in RECIPES and sparsity:
        recipe["sparsity"]["sparsity"] = sparsity
    base: dict[str, Any] = read_recipe(ROOT / "recipes" / "sst2_dense.yaml")
    each = ", ".join(f"{accuracy:.4f} (seed {seed})" for seed, accuracy in sorted(seeds.items()))
    count = f"one seed, {each}" if len(seeds) == 1 else f"the mean over {len(seeds)} seeds: {each}"
    shared = f"dense: {len(dense)} seed" + ("s" if len(dense) > 1 else "")
    return CardFacts(
        title=name,
        architecture="BertForSequenceClassification",
        base_model=Path(base["model"]["name"]).name,
        data="SST-2, validation sentences",
        metrics={"accuracy": statistics.mean(seeds.values())},
        dense_metrics={"accuracy": statistics.mean(dense.values())},
        groups=[("asked for", 0, sparsity)] if sparsity else (),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None,
        note=f"Result of a method ({method}), not a published model: no weights come with this card. Accuracy is "
        f"{count}; {shared}.",
        loads=False,
        pruned=sparsity > 0,
    )


def main() -> None:
    """Write the cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, text in cards().items():
        (output / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(cards())} cards in {output}")


if __name__ == "__main__":
    main()
