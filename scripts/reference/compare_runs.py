"""Print a Markdown table of finished runs, one row per method and sparsity, with the spread over seeds.

    python scripts/reference/compare_runs.py runs/sst2/* [--metric accuracy]

Reads `recipe.yaml` and `eval_results.json` of each folder that `hf-sparse train` wrote. Runs whose recipes differ in
more than the sparsity section, the seed and paths cannot be compared; they are refused. (`hf-sparse compare` also
draws them, and files of results.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_sparse import SparsityError
from hf_sparse.analysis.runs import by_seed, read_run


def main() -> None:
    """Read the folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="accuracy")
    options = parser.parse_args()
    try:
        runs = [read_run(folder, options.metric) for folder in options.runs]
        print(by_seed(runs, options.metric))
    except SparsityError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
