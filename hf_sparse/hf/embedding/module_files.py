"""The files that sentence-transformers keeps beside a transformer: which modules follow it, and their settings."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from ...errors import RecipeError
from ...formats.model_folder import check_link
from ...utils.atomic_io import replace_file
from .pooling import MODULES, has_modules

BESIDE = re.compile(r"modules\.json|(config_)?sentence_(transformers|bert_config)\.json|router_config\.json")
"""Files beside the transformer's own."""
MODULE = re.compile(r"\d{1,2}_\w{1,60}", re.ASCII)
OF_MODULES = re.compile(
    r"config\.json|model\.safetensors|(tokenizer(_config)?|vocab|special_tokens_map)\.json|vocab\.txt"
)
"""Folders of modules, and the files in them."""


def module_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the modules in a folder; none where it has no modules.json.

    Raises:
        CheckpointError: if the folder of a module is a link that leads out.
    """
    if not (folder / MODULES).is_file():
        return
    yield from (path for path in folder.iterdir() if BESIDE.fullmatch(path.name))
    for module in folder.iterdir():
        if MODULE.fullmatch(module.name):
            check_link(module)
            if module.is_dir():
                yield from (path for path in module.iterdir() if OF_MODULES.fullmatch(path.name))


def carry_modules(source: str, output: str | os.PathLike[str], revision: str = "main") -> None:
    """Copy the modules of a model to the folder of one that was made of it; where it has none, remove stale ones.

    Args:
        source: folder or Hub name.

    Raises:
        RecipeError: if they cannot be downloaded.
        CheckpointError: if a file is a link that leads out of its folder.
    """
    target = Path(output)
    stale = {path.relative_to(target) for path in module_files(target)}
    found: list[Path] = []
    if has_modules(source, revision):
        folder = Path(source) if Path(source).is_dir() else _downloaded(source, revision)
        cached = not Path(source).is_dir()  # whose files are links into the cache
        found = [path.relative_to(folder) for path in sorted(module_files(folder))]
        for name in found:
            if not cached:
                check_link(folder / name)
            (target / name.parent).mkdir(parents=True, exist_ok=True)
            with replace_file(target / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    for name in stale - set(found):
        (target / name).unlink()


def _downloaded(source: str, revision: str) -> Path:
    # One level of folders: what `module_files` yields.
    wanted = [MODULES, "*sentence_*.json", "router_config.json", *(f"[0-9]*_*/*.{end}" for end in ("json", "txt"))]
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=[*wanted, "[0-9]*_*/model.safetensors"])
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot download the modules of '{source}': {error}") from error
