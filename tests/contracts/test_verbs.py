"""What every verb of the command line promises: help, exit status 2 with one line for errors, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import tempfile
from unittest import mock

import pytest

from hf_sparse.cli.main import main
from hf_sparse.cli.verb import VERBS
from hf_sparse.errors import BackendError, CheckpointError, HubError, PatternError, RecipeError, SparsityError

ERRORS = (SparsityError, RecipeError, PatternError, CheckpointError, BackendError, HubError, OSError)


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command line and return exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as exit_:  # argparse: 0 after --help, 2 for wrong arguments
            status = int(exit_.code or 0)
    return status, out.getvalue(), err.getvalue()


def arguments_of(name: str) -> list[str]:
    """Return the arguments of the example of a verb."""
    return shlex.split(VERBS[name].example)


def check_help(name: str) -> None:
    """The verb and every option describe themselves; the example is shown; aliases are the same verb."""
    verb = VERBS[name]()
    assert verb.summary
    assert not verb.summary.endswith(".")
    for alias in (name, *verb.aliases):
        status, out, _ = run(alias, "--help")
        assert status == 0
        words = " ".join(out.split())
        assert verb.summary[1:] in words
        assert f"hf-sparse {name} {verb.example}".strip() in words
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert f" {name} " in f" {' '.join(run('--help')[1].split())} "


def check_unknown_option(name: str) -> None:
    """An unknown option is exit status 2, and names the option."""
    if VERBS[name].passes_arguments:
        return
    status, _, err = run(name, *arguments_of(name), "--no-such-option")
    assert status == 2
    assert "--no-such-option" in err


def check_errors(name: str) -> None:
    """Whatever the verb raises on purpose comes out as one line with exit status 2; Ctrl-C is 130."""
    for kind in ERRORS:
        with mock.patch.object(VERBS[name], "run", side_effect=kind("first\n  second\x1b[31m")):
            assert run(name, *arguments_of(name)) == (2, "", f"hf-sparse: {kind.__name__}: first second\\x1b[31m\n")
    with mock.patch.object(VERBS[name], "run", side_effect=KeyboardInterrupt):
        assert run(name, *arguments_of(name)) == (130, "", "hf-sparse: interrupted\n")


def check_missing_files(name: str) -> None:
    """The example, in a folder that has none of its files, is an error of one line."""
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
        status, _, err = run(name, *arguments_of(name))
    assert "Traceback" not in err
    assert status == (2 if arguments_of(name) else 0)
    assert sum(line.startswith("hf-sparse: ") for line in err.splitlines()) == (1 if status else 0)


CHECKS = (check_help, check_unknown_option, check_errors, check_missing_files)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", list(VERBS))
def test_verb_keeps_the_contract(name, check):
    check(name)


def test_verbs_have_no_name_twice():
    names = [name for verb in VERBS for name in (verb, *VERBS[verb].aliases)]
    assert len(names) == len(set(names))


def test_old_names_still_work():
    assert {alias for name in VERBS for alias in VERBS[name].aliases} >= {"teach", "heads"}
