"""What a load reads: the tensors of a packed checkpoint, each decoded when transformers reads it.

`from_pretrained` gives the tensors of a file to the model by slices. Here a packed tensor is a slice too, with the
dense shape and the dense name. So all that transformers does with a dense file (names, merged weights, heads for
another task, towers, offloading, dtypes) it does with a packed one. Files describe themselves: what config.json says of
them does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ...formats.codecs import decode, layout
from ...formats.layer_forms import FORMS_KEY, LayerForms
from ...formats.manifest import Manifest, TensorEntry
from ...formats.model_folder import check_one_folder, weight_files
from ...formats.safetensors_io import MANIFEST_KEY, check_files, read_header
from ...formats.sharding import opened
from ...formats.structure import EDITS_KEY, Edits
from ...pruning.compaction import apply_edits
from ...pruning.compressions.saved_forms import apply_forms
from ...runtime.lazy_weights import can_be_lazy, lazy_weight
from ...utils.atomic_io import finish_replacing
from .key_names import InMemory, names_in_memory
from .pack_state import is_training_state


class _Reads:
    """The reads of one load that are under way.

    transformers reads on threads, and does not wait for them after an error.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._active = 0
        self._closed = False

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise CheckpointError("the load was ended by an error")
            self._active += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._active -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Allow no read any more, and wait for those under way: the files may be replaced or truncated after this."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._active)


class StoredTensor:
    """A tensor of a checkpoint in the form of a safetensors slice.

    Args:
        entry: of the manifest.
        parts: stored parts by suffix, tensors or slices; of a dense tensor, one.
        reads: of the load.
    """

    def __init__(self, entry: TensorEntry, parts: Mapping[str, Any], reads: _Reads) -> None:
        self.entry = entry
        self.parts = parts
        self.reads = reads

    def get_dtype(self) -> str:
        """Return the type of the tensor, by its safetensors name."""
        return self.entry.dtype

    def get_shape(self) -> list[int]:
        """Return the shape of the tensor."""
        return list(self.entry.shape)

    def __getitem__(self, index: Any) -> Tensor:
        with self.reads:
            tensor: Tensor = self.parts[""][index]
            return tensor


class PackedTensor(StoredTensor):
    """A packed tensor: `[...]` decodes and verifies it.

    Args:
        entry, parts, reads: as in `StoredTensor`.
        key: of the tensor, for error messages.
        expected: shape that the decoded tensor must have; None = any, transformers compares it.
        lazy: dtype of a parameter that is decoded when the runtime packs it; None = decode on reading.
    """

    def __init__(
        self,
        entry: TensorEntry,
        parts: Mapping[str, Any],
        reads: _Reads,
        key: str,
        expected: tuple[int, ...] | None = None,
        lazy: torch.dtype | None = None,
    ) -> None:
        super().__init__(entry, parts, reads)
        self.key = key
        self.expected = expected
        self.lazy = lazy

    def __getitem__(self, index: Any) -> Tensor:
        with self.reads:
            parts = {suffix: part[...] for suffix, part in self.parts.items()}
            if self.lazy is not None and index is Ellipsis:
                kind = self.lazy
                self._check_shape()
                return lazy_weight(self.entry.shape, kind, lambda: decode(self.entry, parts, self.key).to(kind))
            weight = decode(self.entry, parts, self.key)
            self._check_shape()  # after decoding: corruption is reported before a wrong shape caused by it
            return weight if index is Ellipsis else weight[index].clone()  # a view would keep the whole in memory

    def _check_shape(self) -> None:
        if self.expected is not None and self.entry.shape != self.expected:
            raise CheckpointError(
                f"'{self.key}' has shape {self.entry.shape} in the checkpoint, but the model built from config.json "
                f"has {self.expected}. Use the config.json of the checkpoint, or ignore_mismatched_sizes=True for a "
                "new head"
            )


@dataclasses.dataclass
class LoadPlan:
    """One load of a packed checkpoint.

    Attributes:
        manifest: of the checkpoint; verified against the files where there are files.
        files: that hold the tensors; none where the tensors are given (`from_pretrained(None, state_dict=...)`).
        targets: names in memory of the weights that are sparse on request, as far as the model has them; known once the
            tensors were.
        nonzeros: of the tensors by name in memory; known once the tensors were.
    """

    manifest: Manifest
    files: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    nonzeros: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, files: Sequence[str], expected: Manifest | None = None) -> LoadPlan | None:
        """Return the plan of these files; None if they are dense.

        Args:
            expected: their contents according to config.json.

        Raises:
            CheckpointError: as `manifest_of`, or if the files are in several folders.
        """
        check_one_folder(files)
        files = settled(files)
        manifest = manifest_of([Path(file) for file in files if file.endswith(".safetensors")], expected)
        return None if manifest is None else cls(manifest, tuple(files))

    def shape_model(self, model: PreTrainedModel) -> None:
        """Give a model that was built from its config the shapes and the layers of the checkpoint."""
        if EDITS_KEY in self.manifest.extra:
            apply_edits(model, Edits.from_dict(self.manifest.extra[EDITS_KEY]), model.base_model_prefix)
        if FORMS_KEY in self.manifest.extra:
            apply_forms(model, LayerForms.from_dict(self.manifest.extra[FORMS_KEY]), model.base_model_prefix)

    def load(self, original: Callable[..., Any], model: PreTrainedModel, given: Any, load: Any, lazy: bool) -> Any:
        """Call `PreTrainedModel._load_pretrained_model` with the decoded tensors.

        Args:
            original: that function.
            model, given, load, lazy: as in `tensors`.
        """
        with self.tensors(model, given, load, lazy) as tensors:
            information, offloaded = original(model, tensors, None, load)
        for twin, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            # What is offloaded was written by transformers, which ties only what it reads from the files themselves.
            if offloaded and kept in offloaded:
                offloaded.setdefault(twin, offloaded[kept])
        return information, offloaded

    @contextlib.contextmanager
    def tensors(
        self, model: PreTrainedModel, given: Mapping[str, Tensor] | None, load: Any, lazy: bool
    ) -> Iterator[dict[str, Any]]:
        """Open the files and yield their tensors: dense ones as they are, packed ones as `PackedTensor`.

        Args:
            model: on the meta device, with the shapes that are to be loaded.
            given: the tensors, where there are no files.
            load: the `LoadStateDictConfig` of transformers.
            lazy: whether weights that the runtime can pack are decoded only then.

        Raises:
            CheckpointError: for a weight of another shape than the model has (unless `ignore_mismatched_sizes`).
        """
        names = names_in_memory(model, self.keys(), load.weight_mapping or ())
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.targets = tuple(self._targets(names, shapes))
        reads = _Reads()
        with contextlib.ExitStack() as stack:
            paths = [Path(file) for file in self.files]
            read = given.__getitem__ if given is not None else stack.enter_context(opened(paths)).slice
            stack.callback(reads.close)
            found: dict[str, Any] = {}
            for key in self.keys():
                entry, place = self.manifest.tensors[key], names.get(key)
                try:
                    parts = {suffix: read(key + suffix) for suffix in layout(entry, key)}
                except KeyError as error:
                    raise CheckpointError(f"the manifest lists {error}, which is not among the tensors") from None
                single = None if place is None or place.converted else place.name
                if single is not None:
                    self.nonzeros[single] = entry.nonzeros
                quantized = single is not None and _quantized(single, model, load)
                if entry.codec == "dense" and given is None and not quantized:  # verified by `check_files`
                    found[key] = StoredTensor(entry, parts, reads)
                    continue
                any_shape = single is None or (load.ignore_mismatched_sizes and not quantized)
                expected = None if any_shape or single is None else shapes[single]
                lazily = lazy and single is not None and entry.codec != "dense"
                dtype = _lazy_dtype(single, model, load) if lazily and single is not None else None
                found[key] = PackedTensor(entry, parts, reads, key, expected, dtype)
            yield found

    def finish(self, model: PreTrainedModel) -> None:
        """Do what is left to do once transformers has loaded everything."""

    def keys(self) -> list[str]:
        """Return the keys of the model's tensors, without the training state of weights that were being pruned."""
        return [key for key in self.manifest.tensors if not is_training_state(key, self.manifest.tensors)]

    def _targets(self, names: Mapping[str, InMemory], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        found: dict[str, None] = {}
        for key in self.manifest.targets:
            place = names.get(key)
            # One of another shape is made anew (`ignore_mismatched_sizes`), so it is not sparse.
            if place is not None and (place.converted or shapes[place.name] == self.manifest.tensors[key].shape):
                found |= dict.fromkeys(place.names)
        return list(found)


def settled(files: Sequence[str]) -> Sequence[str]:
    """Finish a save that was killed while it replaced these files; return those that there are then."""
    if not files:
        return files
    with contextlib.suppress(OSError):  # a folder that cannot be written is read as it is
        finish_replacing(Path(files[0]).parent)
    if all(map(os.path.exists, files)):
        return files
    return [os.fspath(path) for path in weight_files(Path(files[0]).parent)]


def _quantized(name: str, model: PreTrainedModel, load: Any) -> bool:
    quantizer = load.hf_quantizer
    return quantizer is not None and bool(quantizer.param_needs_quantization(model, name))


def _lazy_dtype(name: str, model: PreTrainedModel, load: Any) -> torch.dtype | None:
    """Return the dtype of a weight that the runtime can decode; None if it has to be decoded now."""
    if set((load.dtype_plan or {}).values()) - {torch.float32}:
        return None  # transformers would cast it
    weight = model.get_parameter_or_buffer(name)
    module = model.get_submodule(name.rpartition(".")[0])
    return weight.dtype if can_be_lazy(module, name, weight.dtype, load.device_map) else None


def manifest_of(files: Sequence[Path], expected: Manifest | None = None) -> Manifest | None:
    """Return the manifest of verified files; None if they are dense.

    Args:
        expected: their contents according to config.json.

    Raises:
        CheckpointError: as `check_files`, or if the files are packed and have lost their manifest.
    """
    headers = [read_header(file) for file in files]
    if any(MANIFEST_KEY in metadata for metadata, _ in headers):
        return check_files(files)
    stored = {key for _, tensors in headers for key in tensors}
    for key, entry in expected.tensors.items() if expected is not None else ():
        if any(suffix and key + suffix in stored for suffix in layout(entry, key)):
            raise CheckpointError(
                f"{files[0]} holds '{key}' packed, and no hf_sparse manifest in its header: was it written again by a "
                "tool that drops metadata? Save or convert the model again"
            )
    return None


def is_packed(file: str) -> bool:
    """Return whether hf_sparse wrote a file, from its metadata alone; False also for what cannot be read."""
    if not os.fspath(file).endswith(".safetensors"):
        return False
    try:
        with safe_open(file, framework="pt") as opened_file:
            return MANIFEST_KEY in (opened_file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # transformers reads it next, and says what is wrong with it
