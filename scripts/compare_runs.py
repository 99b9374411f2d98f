"""Print a Markdown table of finished runs, one row per method and sparsity, with the spread over seeds.

    python scripts/compare_runs.py runs/sst2/* [--metric accuracy] [--json results.json]

Reads `recipe.yaml` and `eval_results.json` of each folder that `hf-sparse train` wrote. Runs whose recipes differ in
more than the sparsity section, the seed and paths cannot be compared; they are refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml


def method_of(recipe: dict[str, Any]) -> tuple[str, float]:
    """Return the name of the method and the sparsity that was asked."""
    section = recipe.get("sparsity")
    if not section:
        return "dense", 0.0
    groups = section.get("groups", [section])
    names = [g.get("scorer", "magnitude") for g in groups]
    scorers = {name if isinstance(name, str) else name["name"] for name in names}
    return "+".join(sorted(scorers)), float(groups[0].get("sparsity") or 0.0)


def rest_of(recipe: dict[str, Any]) -> str:
    """Return all that has to be the same in runs that are compared, as text."""
    rest = {key: value for key, value in recipe.items() if key not in ("sparsity", "seed", "model", "data")}
    rest["training"] = {key: value for key, value in rest["training"].items() if key not in ("output_dir", "seed")}
    data = {key: value for key, value in recipe["data"].items() if key not in ("train", "validation")}
    return json.dumps([rest, data, Path(recipe["model"]["name"]).name], sort_keys=True)


def main() -> None:
    """Read the folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--json", type=Path, help="also write every run's figures here")
    options = parser.parse_args()

    values: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    rest: dict[str, Path] = {}
    records = []
    for folder in options.runs:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        rest[rest_of(recipe)] = folder
        if len(rest) > 1:
            sys.exit(f"these runs differ in more than method and seed: {' and '.join(map(str, rest.values()))}")
        measured = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))[f"eval_{options.metric}"]
        method, sparsity = method_of(recipe)
        if recipe["seed"] in values[sparsity, method]:
            sys.exit(f"{folder}: there is another run of {method} at {sparsity} with seed {recipe['seed']}")
        values[sparsity, method][recipe["seed"]] = measured
        records.append({"method": method, "sparsity": sparsity, "seed": recipe["seed"], options.metric: measured})

    print(f"| sparsity | method | {options.metric} (mean) | per seed | lowest - highest |")
    print("|---|---|---|---|---|")
    for (sparsity, method), by_seed in sorted(values.items()):
        seeds = [by_seed[seed] for seed in sorted(by_seed)]
        spread = f"{min(seeds):.3f} - {max(seeds):.3f}" if len(seeds) > 1 else "one seed"
        each = " ".join(f"{value:.3f}" for value in seeds)
        print(f"| {sparsity:.0%} | {method} | {statistics.mean(seeds):.3f} | {each} | {spread} |")
    if options.json:
        records.sort(key=lambda record: (record["sparsity"], record["method"], record["seed"]))
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
