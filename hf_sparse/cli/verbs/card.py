"""`hf-sparse card`: write the model card of a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import add_against, add_folder
from ..verb import VERBS, Verb


@VERBS.register("card")
class Card(Verb):
    """Write a model card."""

    summary = "write the model card (README.md) of a saved model into its folder"
    example = "sparse --against dense --license apache-2.0"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_folder(parser, "folder")
        add_against(parser, "folder of the dense run, for its metrics")
        parser.add_argument("--license", metavar="ID", help="license of the model, as in apache-2.0")
        parser.add_argument("--force", action="store_true", help="overwrite a card that was written by hand")

    def run(self, options: argparse.Namespace) -> None:
        from ...hf.hub.model_card import CARD, card_text, facts_of, is_ours, write_card
        from ...hf.hub.sentence_card import add_section, own_kind

        facts = facts_of(options.folder, options.against, options.license)
        path = Path(options.folder) / CARD
        kind = own_kind(options.folder)
        if kind is not None and facts.pruned and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
            add_section(options.folder, kind, facts)  # all else in the card stays, so nothing is lost
            print(f"Wrote the section about sparsity in {path}")
        else:
            print(f"Wrote {write_card(options.folder, card_text(facts), options.force)}")
