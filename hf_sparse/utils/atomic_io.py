"""Files that are whole: written so that an interruption leaves the old ones, and JSON read without trust."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

from ..errors import CheckpointError, SparsityError
from .text import shorten

PathLike = str | os.PathLike[str]

STAGING_PREFIX = ".saving-"
COMPLETE_PREFIX = ".saved-"
_STALE = ".stale"
"""Folder in a complete one, with an empty folder for each file to remove."""
_ABANDONED_SECONDS = 86_400


def require_regular(path: PathLike) -> None:
    """Raise unless a path is that of a regular file, or a link to one: reading a pipe would wait for ever.

    Raises:
        OSError: if it is not, or there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def read_json(path: PathLike) -> dict[str, Any] | None:
    """Read a JSON file that belongs to a model, such as its config; None if there is none, never for a corrupted one.

    Raises:
        CheckpointError: if it is not a regular file, cannot be read, or does not hold a mapping.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        require_regular(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {shorten(found)}")
    return found


@contextlib.contextmanager
def replace_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which takes its place only if the block ends without an error.

    The new file is forced to the disk first, so that after a crash or a power cut there is the old file or the new one,
    never a part of either.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Created here, exclusively, so that it is ours, and with the rights that the user's umask gives to a new file:
        # safetensors puts one of its own in its place, which nobody but the user can read.
        temporary.open("xb").close()
        rights = temporary.stat().st_mode
        yield temporary
        temporary.chmod(rights)
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: PathLike, text: str) -> None:
    """Write text so that an interruption leaves the old file whole; into pipes and terminals directly."""
    if Path(path).exists() and not Path(path).is_file():
        Path(path).write_text(text, encoding="utf-8")
        return
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replace_files(
    folder: PathLike, last: str | None = None, stale: Callable[[Sequence[str]], Iterable[str]] | None = None
) -> Iterator[Path]:
    """Yield an empty folder, whose files replace those of `folder` if the block ends without an error.

    A process that is killed in the block leaves the old files. One that is killed while it replaces them, one by one,
    leaves a folder with the rest, from which `finish_replacing` goes on. Both are cleaned up by the next call.

    Args:
        folder: made if there is none.
        last: name of the file that is replaced after all others, because it makes them valid.
        stale: takes the names of the new files, returns those of old ones to remove: before the last is replaced, so
            that none of them is ever beside it, and by whoever goes on after an interruption.

    Raises:
        SparsityError: if `folder` is a file.
    """
    final = Path(folder)
    if final.is_file():
        raise SparsityError(f"cannot save into {final}: it is a file, not a directory")
    final.mkdir(parents=True, exist_ok=True)
    finish_replacing(final)
    for abandoned in final.glob(f"{STAGING_PREFIX}*"):
        with _lock(abandoned) as free:
            if free:
                shutil.rmtree(abandoned, ignore_errors=True)
    # Inside the final one, so that both are on one file system and replacing is atomic.
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=final))
    with _lock(staging):
        try:
            yield staging
            fresh = _files(staging, last)
            for path in fresh:
                sync_file(path)
            names = [path.name for path in fresh]
            for name in stale(names) if stale is not None else ():
                (staging / _STALE / name).mkdir(parents=True)
            sync_folder(staging)
            complete = staging.rename(final / staging.name.replace(STAGING_PREFIX, COMPLETE_PREFIX, 1))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(final)
        _replace(complete, last)


def finish_replacing(folder: PathLike) -> None:
    """Go on where a process was killed while it replaced files; where nothing was interrupted, do nothing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     finish_replacing(folder)
    """
    for complete in sorted(Path(folder).glob(f"{COMPLETE_PREFIX}*")):
        with _lock(complete) as free:
            if free and complete.is_dir() and not complete.is_symlink():
                _replace(complete, None)


def _replace(complete: Path, last: str | None) -> None:
    files = _files(complete, last)
    final = [path for path in files if path.name == last]
    for path in files[: len(files) - len(final)]:
        path.replace(complete.parent / path.name)
    with contextlib.suppress(FileNotFoundError):
        for path in (complete / _STALE).iterdir():  # names of a folder, which lead nowhere else
            (complete.parent / path.name).unlink(missing_ok=True)
    for path in final:
        path.replace(complete.parent / path.name)
    sync_folder(complete.parent)
    shutil.rmtree(complete, ignore_errors=True)


def _files(folder: Path, last: str | None) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    return sorted(files, key=lambda path: (path.name == last, path.name))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Yield whether no living process uses a folder; keep others from it until the block ends."""
    if fcntl is None:  # without locks, age has to do
        yield time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:  # held, or a file system without locks
            free = False
        yield free
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Force the content of a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk: a rename is there after a power cut only when the folder is."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
