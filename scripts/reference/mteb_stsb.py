"""Run MTEB on saved models, with a task whose data is on this machine: STS-B validation.

    python scripts/reference/mteb_stsb.py out/e80_s0 --data data/stsb/validation.jsonl [--runtime cpu]

It needs an environment with mteb (tested: 2.26.24) beside hf_sparse and its extra "embedding"; nothing is downloaded. A
packed model needs nothing special: mteb takes a SentenceTransformer, in runtime form too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import mteb  # type: ignore[import-not-found]
from mteb.abstasks.sts import AbsTaskSTS  # type: ignore[import-not-found]
from mteb.abstasks.task_metadata import TaskMetadata  # type: ignore[import-not-found]
from sentence_transformers import SentenceTransformer

import hf_sparse

SPLIT = "validation"


class LocalSTS(AbsTaskSTS):
    """Pairs of a local file of lines of JSON, with a label from 0 to 5."""

    path: ClassVar[Path]
    min_score, max_score = 0, 5
    metadata = TaskMetadata(
        name="LocalSTSBenchmark",
        dataset={"path": "local", "revision": "local"},
        description="STS-B, the validation pairs of GLUE.",
        reference=None,
        type="STS",
        category="t2t",
        modalities=["text"],
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
    )

    def load_data(self, **options: Any) -> None:
        """Read the file."""
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        columns = {key: [row[key] for row in rows] for key in ("sentence1", "sentence2")}
        scores = {"score": [float(row["label"]) for row in rows]}
        self.dataset = datasets.DatasetDict({SPLIT: datasets.Dataset.from_dict(columns | scores)})
        self.data_loaded = True


def main() -> None:
    """Print the main score of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runtime", help="backend of hf_sparse.to_runtime (weights as they were trained)")
    options = parser.parse_args()
    LocalSTS.path = options.data
    for name in options.models:
        model = SentenceTransformer(name, device="cpu")
        if options.runtime:
            hf_sparse.to_runtime(model, options.runtime)
        found = mteb.evaluate(model, tasks=[LocalSTS()], cache=None, encode_kwargs={"batch_size": 64})
        scores = found.task_results[0].scores[SPLIT][0]
        print(f"{name}: {LocalSTS.metadata.main_score} {scores['main_score']:.4f}, mteb {mteb.__version__}", flush=True)


if __name__ == "__main__":
    main()
