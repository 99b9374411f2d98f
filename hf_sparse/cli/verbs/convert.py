"""`hf-sparse convert`: store a checkpoint of any origin in a format of ours."""

from __future__ import annotations

import argparse

from ..options import add_revision, given, spec
from ..verb import VERBS, Verb


@VERBS.register("convert")
class Convert(Verb):
    """Convert a checkpoint."""

    summary = "convert a checkpoint of any origin: packed or dense, other codecs, other shards"
    example = "sparse dense --format dense"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("source", help="folder, file (.safetensors, .bin, .gguf) or Hub name")
        parser.add_argument("output", help="folder (or file) to write")
        parser.add_argument("--format", default="packed", help="packed (default), smallest or dense")
        parser.add_argument("--codec", type=spec, help="one codec for all weights (the smallest for each weight)")
        parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of a file (2GB)")

        parser.add_argument(
            "--compact", action="store_true", help="remove heads, neurons and filters that are zero as a whole"
        )
        add_revision(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...hf.conversion.convert import import_checkpoint

        settings = given(options, "format", "codec", "max_shard_size", "compact", "revision")
        print(f"{import_checkpoint(options.source, options.output, **settings)}\n\nSaved in {options.output}")
