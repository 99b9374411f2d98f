"""Run a Python program of others in this process, where hf_sparse is imported already and packed models load."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import RecipeError

_PYTHON = re.compile(r"python[\d.]*(\.exe)?")


def is_program(arguments: Sequence[str]) -> bool:
    """Return whether the arguments of `python -m hf_sparse` are a program and its arguments, and not a verb.

    Example:
        >>> is_program(["script.py", "--flag"]), is_program(["-m", "module"]), is_program(["train", "recipe.yaml"])
        (True, True, False)
    """
    return bool(arguments) and (arguments[0] == "-m" or arguments[0].endswith(".py"))


def program(arguments: Sequence[str]) -> Callable[[], int]:
    """Return a function that runs a program as `python` would, once.

    What the program raises and the status that it exits with pass through; `sys.argv` and `sys.path[0]` are its own.

    Args:
        arguments: the name of a console script, a Python file, or `-m MODULE`, each with its arguments; `python` may
            stand in front.

    Raises:
        RecipeError: if there is no such program, or it is not one of Python.
    """
    rest = list(arguments)
    if rest and rest[0] == "--":
        del rest[0]
    if rest and _PYTHON.fullmatch(os.path.basename(rest[0])):
        del rest[0]
    if not rest or (rest[0].startswith("-") and rest[0] != "-m"):
        raise RecipeError(
            f"name a program: a console script, a Python file or -m MODULE, got {' '.join(arguments)!r}. Options of "
            "Python itself are not passed on"
        )
    if rest[0] == "-m":
        return _module(rest[1:])
    if Path(rest[0]).exists():
        return _script(rest[0], rest)
    return _console_script(rest)


def _module(arguments: list[str]) -> Callable[[], int]:
    if not arguments:
        raise RecipeError("-m must be followed by the name of a module")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(arguments[0])
    except (ImportError, ValueError) as error:
        raise RecipeError(f"there is no module {arguments[0]!r}: {error}") from error
    if found is None:
        raise RecipeError(f"there is no module {arguments[0]!r} in this environment")

    def run() -> int:
        sys.argv = list(arguments)  # runpy puts the path of the module in the first place
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return 0

    return run


def _script(path: str, arguments: list[str]) -> Callable[[], int]:
    def run() -> int:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(path).resolve().parent) if Path(path).is_file() else path)
        runpy.run_path(path, run_name="__main__")
        return 0

    return run


def _console_script(arguments: list[str]) -> Callable[[], int]:
    name = arguments[0]
    where = shutil.which(name)
    entries = importlib.metadata.entry_points(group="console_scripts", name=name)
    if entries:
        (entry, *_) = entries

        def run() -> int:
            sys.argv = [where or name, *arguments[1:]]
            sys.exit(entry.load()())

        return run
    if where is None:
        raise RecipeError(f"there is no program {name!r}, requested by: {' '.join(arguments)}")
    with open(where, "rb") as file:
        first = file.readline(200)
    if not (first.startswith(b"#!") and b"python" in first):
        raise RecipeError(
            f"{where} is not a Python program, so hf_sparse cannot be registered in it. Launchers that start processes "
            "of their own take a module: torchrun -m hf_sparse script.py, accelerate launch -m hf_sparse script.py"
        )
    return _script(where, [where, *arguments[1:]])
