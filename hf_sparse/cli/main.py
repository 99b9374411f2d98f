"""The command line: `hf-sparse --help` lists its verbs, `hf-sparse VERB --help` the options of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import SparsityError, printable
from . import verbs as _verbs  # noqa: F401 - importing them registers them
from .verb import VERBS, Verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, surplus = _parser().parse_known_args(given)
    if surplus:
        options.parser.error(_describe_surplus(options.parser, given, surplus))
    verb: Verb = options.verb
    try:
        program = verb.run(options)
    except (SparsityError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(f"hf-sparse: {type(error).__name__}: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-sparse: interrupted", file=sys.stderr)
        return 130
    return 0 if program is None else program()


def one_line(text: str) -> str:
    r"""Return a text on one line, its control characters escaped: messages quote names from untrusted files.

    Example:
        >>> print(one_line("2 keys differ:\n  a\n  b\x1b[31m"))
        2 keys differ: a b\x1b[31m
    """
    return printable(" ".join(text.split()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sparse", description="Train, prune, store and inspect sparse transformers."
    )
    commands = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name in VERBS:
        verb = VERBS[name]()
        command = commands.add_parser(
            name,
            aliases=list(verb.aliases),
            help=verb.summary,
            description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
            epilog=f"example: hf-sparse {name} {verb.example}".rstrip(),
        )
        verb.add_arguments(command)
        command.set_defaults(verb=verb, parser=command)
    return parser


def _describe_surplus(parser: argparse.ArgumentParser, given: Sequence[str], surplus: Sequence[str]) -> str:
    """Return what is wrong with arguments that no option takes: mostly a second value of one that takes one."""
    message = f"unrecognized arguments: {' '.join(surplus)}"
    options = [place for place, word in enumerate(given) if word.startswith("--")]
    # The same word may stand elsewhere, where an option takes it: the one that follows a value is too much.
    for before, end in zip(options, [*options[1:], len(given)], strict=True):
        name, equals, value = given[before].partition("=")
        values = [value] * bool(equals) + list(given[before + 1 : end])
        action = next((action for action in parser._actions if name in action.option_strings), None)
        single = action is not None and action.nargs is None and not surplus[0].startswith("-")
        if single and surplus[0] in values[1:]:
            break
    else:
        return message
    if isinstance(action, argparse._AppendAction):
        return f"{message}. {name} takes one value, and may be repeated: {' '.join(f'{name} {v!r}' for v in values)}"
    return f"{message}. {name} takes one value, got {' and '.join(map(repr, values))}"
