"""`hf-sparse inspect`: list the tensors of a file without loading a model."""

from __future__ import annotations

import argparse
import json

from ..options import add_json
from ..verb import VERBS, Verb


@VERBS.register("inspect")
class Inspect(Verb):
    """Inspect a checkpoint."""

    summary = "list tensors, sparsity and sizes of a checkpoint, from its files alone"
    example = "sparse/model.safetensors"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("path", help="safetensors file, or a folder with some")
        add_json(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...formats.inspection import inspect

        inspection = inspect(options.path)
        print(json.dumps(inspection.to_dict(), indent=2) if options.json else inspection)
