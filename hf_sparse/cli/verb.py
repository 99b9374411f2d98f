"""What a verb of the command line is: its name, its options and what it does, in one class."""

from __future__ import annotations

import abc
import argparse
from collections.abc import Callable
from typing import ClassVar

from ..registry import Registry


class Verb(abc.ABC):
    """One verb of `hf-sparse`: `hf-sparse NAME ...`.

    Heavy modules (datasets, onnx, matplotlib) are imported inside `run`, so that `--help` stays fast.

    Attributes:
        name: set by `VERBS.register`.
        aliases: other names of the same verb.
        summary: one imperative sentence without a full stop, shown by `hf-sparse --help`.
        passes_arguments: all that follows goes to another program, options too.
        example: arguments of a typical call, shown by `hf-sparse NAME --help`.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    passes_arguments: ClassVar[bool] = False
    summary: ClassVar[str]
    example: ClassVar[str]

    @abc.abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of this verb."""

    @abc.abstractmethod
    def run(self, options: argparse.Namespace) -> Callable[[], int] | None:
        """Do what the arguments say.

        Returns:
            None, or what is to run as if there was no `hf-sparse` around it: its errors and exit status are its own.

        Raises:
            SparsityError: for what the user can put right; it becomes one line on stderr and exit status 2.
        """


VERBS: Registry[Verb] = Registry("verb")
"""All verbs by name."""
