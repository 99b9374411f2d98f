"""`hf-sparse convert`: store a checkpoint in another format."""

from __future__ import annotations

import argparse

from ..options import spec
from ..verb import VERBS, Verb


@VERBS.register("convert")
class Convert(Verb):
    """Convert a checkpoint."""

    summary = "convert a checkpoint: packed or dense, other codecs, other shards"
    example = "sparse dense --format dense"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("source", help="folder or safetensors file; dense, packed or compressed-tensors < 0.15")
        parser.add_argument("output", help="folder (or file) to write")
        parser.add_argument("--format", default="packed", help="packed (default), smallest or dense")
        parser.add_argument("--codec", type=spec, help="one codec for all weights (the smallest for each weight)")
        parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of a file (2GB)")

    def run(self, options: argparse.Namespace) -> None:
        from ...hf.quantization.convert import convert

        done = convert(options.source, options.output, options.format, options.codec, options.max_shard_size)
        print(f"{done}\n\nSaved in {options.output}")
