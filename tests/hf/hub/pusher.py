"""A process of its own that pushes a folder, to be killed in the middle: python -m tests.hf.hub.pusher FOLDER REPO."""

from __future__ import annotations

import sys

from hf_sparse.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
