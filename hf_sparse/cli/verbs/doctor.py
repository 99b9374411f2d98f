"""`hf-sparse doctor`: check the environment."""

from __future__ import annotations

import argparse
import json

from ..options import add_json
from ..verb import VERBS, Verb


@VERBS.register("doctor")
class Doctor(Verb):
    """Check the environment."""

    summary = "check which kernels and backends work on this machine"
    example = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_json(parser)

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.environment import diagnose

        diagnosis = diagnose()
        print(json.dumps(diagnosis.to_dict(), indent=2) if options.json else diagnosis)
