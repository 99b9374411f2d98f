"""`hf-sparse agree`: what several runs have in common."""

from __future__ import annotations

import argparse
import json

from ..verb import VERBS, Verb


@VERBS.register("agree")
class Agree(Verb):
    """Compare the masks of saved models."""

    summary = "compare masks: how much runs agree, against chance, and which heads and neurons all of them keep"
    example = "runs/seed0 runs/seed1 runs/seed2 --html agreement.html"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folders", nargs="+", metavar="DIR", help="saved models of one architecture, two or more")
        parser.add_argument("--html", metavar="FILE", help="write a page too")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, options: argparse.Namespace) -> None:
        from ...analysis.agreement import agreement

        found = agreement(options.folders)
        print(json.dumps(found.to_dict(), indent=2) if options.json else found)
        if options.html:
            found.write(options.html)
            if not options.json:
                print(f"Saved in {options.html}")
