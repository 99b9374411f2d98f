"""`hf-sparse run`: a program of others, in which packed models load."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..program import program
from ..verb import VERBS, Verb


@VERBS.register("run")
class Run(Verb):
    """Run a program."""

    summary = "run a Python program unchanged, in which packed models load"
    example = "-- lm_eval --model hf --model_args pretrained=sparse --tasks wikitext"
    passes_arguments = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "program",
            nargs=argparse.REMAINDER,
            metavar="PROGRAM",
            help="console script, Python file or -m MODULE, with its arguments",
        )

    def run(self, options: argparse.Namespace) -> Callable[[], int]:
        return program(options.program)
