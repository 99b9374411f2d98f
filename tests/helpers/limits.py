"""Hostile input is tried in a process of its own, with a limit on memory and on time."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

# A server that has imported everything once and forks: a new interpreter for every file would take seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["hf_sparse.cli.main", "hf_sparse.hf.hub.push", "hf_sparse.hf.conversion.convert"])


def limited(
    function: Callable[..., T], *arguments: Any, seconds: int = 30, megabytes: int = 1024, file_bytes: int | None = None
) -> T:
    """Return what a function of a module returns, or raise what it raises.

    Args:
        seconds: of processor time and, three times as many, of the clock; the test fails after that.
        megabytes: that it may allocate; it gets a MemoryError after that.
        file_bytes: that it may write into one file; more is an OSError, as on a full disk.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    limits = (seconds, megabytes, file_bytes)
    process = _CONTEXT.Process(target=_run, args=(sender, limits, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(3 * seconds):
            pytest.fail(f"{function.__name__} took longer than {seconds} s")
        try:
            raised, outcome = receiver.recv()
        except EOFError:
            process.join(seconds)
            pytest.fail(f"{function.__name__} was ended by signal {-(process.exitcode or 0)}: time or memory ran out")
    finally:
        process.kill()
        process.join()
        receiver.close()
    if raised:
        raise outcome
    return outcome


def _run(sender: Connection, limits: tuple[int, int, int | None], function: Any, arguments: Sequence[Any]) -> None:
    seconds, megabytes, file_bytes = limits
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        outcome = False, function(*arguments)
    except BaseException as error:  # noqa: BLE001  raised again in the test
        outcome = True, error
    sender.send(outcome)


def command(*arguments: object) -> tuple[int, str, str]:
    """Run `hf-sparse` in this process; return its status, output and errors. For `limited`."""
    from hf_sparse.cli.main import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), errors.getvalue()
