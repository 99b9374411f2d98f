"""`hf-sparse push`: upload a saved model to the Hub."""

from __future__ import annotations

import argparse

from ..options import add_folder, given
from ..verb import VERBS, Verb


@VERBS.register("push")
class Push(Verb):
    """Upload a model."""

    summary = "upload a saved model to the Hub"
    example = "sparse user/bert-sparse --private"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_folder(parser, "folder")
        parser.add_argument("repo", metavar="REPO", help="user/name; created if it does not exist")
        parser.add_argument(
            "--private", action="store_true", default=None, help="make the repository private if it is new"
        )
        parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if missing (main)")
        parser.add_argument("--create-pr", action="store_true", help="open a pull request")

    def run(self, options: argparse.Namespace) -> None:
        from ...hf.hub.push import push_folder

        done = push_folder(options.folder, options.repo, **given(options, "private", "revision", "create_pr"))
        print(f"Pushed: {done.pr_url or done.commit_url}")
