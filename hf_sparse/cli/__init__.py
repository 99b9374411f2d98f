"""The command line: `hf-sparse VERB`."""

from .main import main

__all__ = ["main"]
