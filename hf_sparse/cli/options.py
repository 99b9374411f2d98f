"""Options that several verbs share, and checks of their values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..utils import atomic_io
from ..utils.text import shorten


def add_folder(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the folder of a saved model, under a name."""
    parser.add_argument(name, metavar="DIR", help="folder of a saved model")


def add_model(parser: argparse.ArgumentParser, output: str | None = None) -> None:
    """Add a model, saved or on the Hub, and --output if the verb writes another.

    Args:
        output: what --output is, as in "folder for the pruned model".
    """
    parser.add_argument("model", metavar="DIR", help="folder or Hub name")
    if output is not None:
        parser.add_argument("--output", required=True, metavar="DIR", help=output)


def add_against(parser: argparse.ArgumentParser, purpose: str = "dense baseline") -> None:
    """Add --against, the dense baseline."""
    parser.add_argument("--against", metavar="DENSE_DIR", help=purpose)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add --revision of a model on the Hub."""
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (main)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json for output on stdout."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --set, which changes values of a recipe."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a value of the recipe, as in sparsity.sparsity=0.97 or training.max_steps=100; may be repeated",
    )


def spec(text: str) -> Any:
    """Return a part of a recipe: a name, or a YAML mapping as in '{name: block, rows: 32, cols: 32}'."""
    return name_or_mapping(text, "a name, or a mapping as in '{name: block, rows: 32, cols: 32}'")


def name_or_mapping(text: str, wanted: str) -> Any:
    """Return a text as it is, and a YAML mapping, which begins with a brace, as a dictionary.

    Args:
        wanted: what the option takes, for the message about anything else.

    Raises:
        argparse.ArgumentTypeError: for a mapping that is not valid YAML, or has a colon without a space.
    """
    from ..utils.strict_yaml import parse_yaml

    if not text.startswith("{"):
        return text
    try:
        found = parse_yaml(text)
        wrong = None if isinstance(found, dict) else "it is not a mapping"
    except RecipeError as error:
        wrong = " ".join(str(error).replace(' in "<unicode string>",', "").split())
    if wrong is None:
        empty = [key for key, value in found.items() if value is None and ":" in str(key)]
        wrong = f"key {empty[0]!r} has no value (a colon is followed by a space)" if empty else None
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"it must be {wanted}, got {shorten(text)}: {wrong}")
    return found


def glob(text: str) -> str:
    """Return a glob over names of layers.

    Raises:
        argparse.ArgumentTypeError: for several of them in one value.
    """
    several = text.replace(",", " ").split()
    if len(several) != 1 or several[0] != text:
        raise argparse.ArgumentTypeError(
            f"it takes one glob, and may be repeated, got {text!r}: write the option once for each of {several}"
        )
    return text


def given(options: argparse.Namespace, *keys: str) -> dict[str, Any]:
    """Return the options with these names, as arguments of a function.

    Example:
        >>> given(argparse.Namespace(batch=2, length=None, verb=None), "batch", "length")
        {'batch': 2, 'length': None}
    """
    return {key: getattr(options, key) for key in keys}


def separate_output(model: str, output: str) -> Path:
    """Return the output folder.

    Raises:
        RecipeError: if it is the folder of the model, which would be overwritten.
    """
    if Path(output).resolve() == Path(model).resolve():
        raise RecipeError(f"--output {output} is the folder of the model, which would be overwritten; choose another")
    return Path(output)


def write_text(path: str | Path, text: str) -> None:
    """Write a file as a whole.

    Raises:
        RecipeError: if it cannot be written.
    """
    try:
        atomic_io.write_text(path, text)
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error}") from error
