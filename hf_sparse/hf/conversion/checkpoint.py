"""A checkpoint to be read: its config, its tensors from any kind of file, and the model that the config describes."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ...errors import CheckpointError
from ...formats.manifest import Manifest, refuse_runtime
from ...formats.model_folder import PICKLED, SINGLE, check_link, pickled_files, weight_files
from ...formats.safetensors_io import Stored
from ...formats.sharding import opened
from ...formats.torch_bin import TorchTensors, read_torch_bin
from ...utils.atomic_io import read_json
from ..auto import model_class
from ..quantization.config import METHOD
from ..quantization.key_names import names_in_memory
from ..quantization.load_plan import manifest_of
from .gguf import is_gguf, unpack_gguf

_PARALLEL = "module."
"""What nn.DataParallel and DistributedDataParallel put in front of every name."""


class TensorStore(Protocol):
    """Tensors by name, described before they are read."""

    @property
    def headers(self) -> Mapping[str, Stored]:
        """Type, shape and size of each tensor."""

    def get(self, key: str) -> Tensor:
        """Read one tensor."""


class Checkpoint:
    """What one source holds.

    Args:
        path: folder or file, as given.
        config: content of `config.json`; empty where there is none.
        files: that hold the tensors.
        store: the tensors, under the names in the files.
        manifest: of ours; None if another program wrote the files.
        container: "safetensors", "bin" or "GGUF".
        ties: names of tensors that share their bytes with another, with that one.
        size: bytes of the files; None = of `files`.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        files: Sequence[Path],
        store: TensorStore,
        manifest: Manifest | None = None,
        container: str = "safetensors",
        ties: Mapping[str, str] | None = None,
        size: int | None = None,
    ) -> None:
        self.size = sum(file.stat().st_size for file in files) if size is None else size
        self.path, self.config, self.files = path, dict(config), tuple(files)
        self.manifest, self.container, self._ties = manifest, container, ties or {}
        # Only where every name has it: a model may have a part that is called so.
        prefix = _PARALLEL if store.headers and all(key.startswith(_PARALLEL) for key in store.headers) else ""
        self._store, self._prefix = store, prefix
        self.headers = {key.removeprefix(prefix): stored for key, stored in store.headers.items()}

    def get(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._store.get(self._prefix + key)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model that the config describes, at its full size and without weights.

        Raises:
            CheckpointError: if transformers knows no such model.
        """
        kind = str(self.config.get("model_type"))
        layers = self.config.get("num_hidden_layers", self.config.get("n_layers", 0))
        if isinstance(layers, int) and layers > max(len(self.headers), 1):
            raise CheckpointError(f"config.json asks for {layers} layers, and there are {len(self.headers)} tensors")
        try:
            settings = {key: value for key, value in self.config.items() if key not in _NOT_OF_THE_MODEL}
            config = AutoConfig.for_model(
                kind, **{key: value for key, value in settings.items() if key != "model_type"}
            )
            cls = model_class(self.config.get("architectures"), config)
            with torch.device("meta"):
                made = AutoModel.from_config(config) if cls is AutoModel else cls._from_config(config)
        except Exception as error:
            raise CheckpointError(
                f"config.json (model_type {kind!r:.80}) describes no model that transformers can build, so it is not "
                f"known which weights form a head: {error}"
            ) from error
        return made

    @functools.cached_property
    def keys_by_name(self) -> dict[str, str]:
        """The key of each tensor in the files by its name in `model`, without those that are merged or split."""
        places = names_in_memory(self.model, self.headers)
        return {place.name: key for key, place in places.items() if not place.converted}

    def dropped_ties(self) -> set[str]:
        """Return the names of tensors that are another's, and that the model ties by itself."""
        twins = [key.removeprefix(self._prefix) for key in self._ties]
        if not twins or not self.config:
            return set()
        try:
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            names = {self.keys_by_name.get(name, name) for name in (*tied, *tied.values())}
        except CheckpointError:
            return set()
        return {key for key in twins if key in names}


_NOT_OF_THE_MODEL = (
    "quantization_config", "compression_config", "pruned_heads", "architectures", "auto_map", "transformers_version",
    "torch_dtype", "dtype", "_name_or_path",
)  # fmt: skip


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a folder or a file of any kind that is read here.

    Raises:
        CheckpointError: if there is no model in it, or a file is corrupted or incomplete.
    """
    if is_gguf(path):
        with tempfile.TemporaryDirectory(prefix="hf-sparse-gguf-") as folder:
            unpack_gguf(path, Path(folder))
            files = weight_files(Path(folder))
            with opened(files) as shards:
                yield Checkpoint(
                    Path(folder), _config(Path(folder)), files, shards, container="GGUF", size=path.stat().st_size
                )
        return
    config = _config(path) if path.is_dir() else {}
    pickled = _pickled(path)
    if pickled:
        tensors: TorchTensors = read_torch_bin(pickled)
        yield Checkpoint(path, config, pickled, tensors, container="bin", ties=tensors.ties())
        return
    files = weight_files(path)
    manifest = manifest_of(files, _described(config))
    refuse_runtime(manifest, files[0])
    with opened(files) as shards:
        yield Checkpoint(path, config, files, shards, manifest)


def _config(folder: Path) -> dict[str, Any]:
    check_link(folder / "config.json")
    return read_json(folder / "config.json") or {}


def _pickled(path: Path) -> list[Path]:
    """Return the `.bin` files of a source that has no safetensors: those are safer, and transformers prefers them."""
    if path.is_file():
        return [path] if path.suffix in (".bin", ".pt", ".pth") else []
    if not path.is_dir() or (path / SINGLE).is_file() or any(path.glob("model-*.safetensors")):
        return []
    files = pickled_files(path)
    if not files and not any(path.glob("*.safetensors")):
        raise CheckpointError(f"folder {path} holds no .safetensors file, and no {PICKLED}")
    for file in files:
        check_link(file)
    return files


def _described(config: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest in a config of ours; files have their own, which is the one that counts."""
    stated = config.get("quantization_config")
    ours = isinstance(stated, Mapping) and stated.get("quant_method") == METHOD
    manifest = stated.get("manifest") if isinstance(stated, Mapping) and ours else None
    return None if manifest is None else Manifest.from_dict(manifest)
