"""A source that is on the Hub: only the files that are read here are downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from ...errors import CheckpointError, HubError, RecipeError
from ...utils.text import shorten

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_READ = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "zs.pt")


def fetched(source: str | os.PathLike[str], revision: str = "main") -> Path:
    """Return the path of a source, downloaded if it is not there and its name is one of the Hub.

    Raises:
        RecipeError: for anything but a text or a path.
        CheckpointError: if there is no such file or folder.
        HubError: if there is no such model on the Hub, or it could not be reached.
    """
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"the source must be a folder, a file or a Hub name, got {shorten(source)}")
    path = Path(source)
    if path.exists() or not _NAME.fullmatch(os.fspath(source)):
        if not path.exists():
            raise CheckpointError(f"there is no file or folder {path}")
        return path
    try:
        return Path(snapshot_download(os.fspath(source), revision=revision, allow_patterns=list(_READ)))
    except Exception as error:
        raise HubError(f"there is no file or folder {path}, and no such model on the Hub: {error}") from error
