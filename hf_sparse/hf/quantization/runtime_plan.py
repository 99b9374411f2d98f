"""What a load reads of a file in runtime form: tensors as they are mapped, and packed layers in place of weights.

All processes that load the file have one copy of it, in the page cache of the system.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import CheckpointError
from ...formats.aligned_file import FILLER
from ...formats.manifest import RUNTIME_KEY, Manifest, is_runtime_form
from ...formats.safetensors_io import reading
from ...modeling.class_swap import plain_class_of
from ...runtime.saved_form import SavedRuntime
from ...runtime.saved_model import packed_tensors, restore
from .load_plan import LoadPlan


def plan_of(files: Sequence[str], expected: Manifest | None = None) -> LoadPlan | None:
    """Return what is loaded of these files; None if they are dense.

    Raises:
        CheckpointError: as `LoadPlan.of`, or for a runtime form that this machine cannot read.
    """
    plan = LoadPlan.of(files, expected)
    if plan is None or not is_runtime_form(plan.manifest):
        return plan
    saved = SavedRuntime.from_dict(plan.manifest.extra[RUNTIME_KEY])
    saved.check_here()
    return RuntimePlan(plan.manifest, plan.files, saved=saved)


class _Placeholder:
    """What a weight that is packed is loaded as: its shape, and no memory.

    Args:
        shape: of the weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def get_dtype(self) -> str:
        """Return the type, by its safetensors name."""
        return "F32"

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return nn.Parameter(torch.zeros(1).expand(self.shape))


@dataclasses.dataclass
class RuntimePlan(LoadPlan):
    """One load of a file in runtime form.

    Attributes:
        saved: what the file says of it.
        mapped: its tensors by name, once they were read.
    """

    saved: SavedRuntime = dataclasses.field(kw_only=True)
    mapped: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def shape_model(self, model: PreTrainedModel) -> None:
        """As `LoadPlan.shape_model`.

        Raises:
            CheckpointError: if the model is of another class, or is to have another dtype.
        """
        name = plain_class_of(model).__name__
        if name != self.saved.model:
            raise CheckpointError(
                f"{self.files[0]} has a {self.saved.model} in runtime form, and was loaded as a {name}: load it with "
                "hf_sparse.load_runtime, the auto class of its task, or from_pretrained of that class if it is your own"
            )
        if not len(self.files) == 1:
            raise CheckpointError(f"a runtime form is one file, and there are {len(self.files)} beside {self.files[0]}")
        super().shape_model(model)

    def load(self, original: Callable[..., Any], model: PreTrainedModel, given: Any, load: Any, lazy: bool) -> Any:
        """As `LoadPlan.load`; tensors have the names that they have in memory, so that none is renamed."""
        devices = {str(device) for device in (load.device_map or {"": "cpu"}).values()}
        if devices != {"cpu"} or load.disable_mmap:
            raise CheckpointError(
                "a model in runtime form is mapped into memory, on the CPU: load it without device_map and disable_mmap"
            )
        information, offloaded = super().load(
            original, model, given, dataclasses.replace(load, weight_mapping=[]), lazy
        )
        if absent := information.missing_keys - (getattr(model, "all_tied_weights_keys", None) or {}).keys():
            raise CheckpointError(f"{self.files[0]} lacks '{min(absent)}': use its config.json")
        # Then a save computes the names of the checkpoint format, as for a model that was not loaded.
        vars(model).pop("_weight_conversions", None)
        return information, offloaded

    @contextlib.contextmanager
    def tensors(
        self, model: PreTrainedModel, given: Mapping[str, Tensor] | None, load: Any, lazy: bool
    ) -> Iterator[dict[str, Any]]:
        """Map the file and yield the tensors of the model itself, and placeholders of weights that are packed."""
        path = Path(self.files[0])
        with reading(path), safe_open(path, framework="pt") as file:
            self.mapped = {key: file.get_tensor(key) for key in self.manifest.tensors if not key.startswith(FILLER)}
        packed = packed_tensors(self.saved)
        found: dict[str, Any] = {key: tensor for key, tensor in self.mapped.items() if key not in packed}
        for alias, name in self.saved.shared.items():
            if name in found:
                found[alias] = found[name]
        shapes = model.state_dict()
        for unit in self.saved.units:
            for name in (f"{layer}.weight" for layer in unit.layers):
                if name in shapes:
                    found[name] = _Placeholder(shapes[name].shape)
        for name, tensor in found.items():
            if isinstance(tensor, Tensor) and name in shapes and _differs(tensor, shapes[name]):
                expected = shapes[name]
                raise CheckpointError(
                    f"'{name}' is {tensor.dtype} of shape {tuple(tensor.shape)} in the runtime form, and the model is "
                    f"to have {expected.dtype} of shape {tuple(expected.shape)}: use its config.json, and no dtype"
                )
        self.targets, self.nonzeros = tuple(self.saved.targets), dict(self.saved.targets)
        yield found

    def finish(self, model: PreTrainedModel) -> None:
        """Bring the model into runtime form, once all else is loaded."""
        restore(model, self.saved, self.mapped.get)
        self.mapped = {}


def _differs(tensor: Tensor, expected: Tensor) -> bool:
    return tensor.shape != expected.shape or tensor.dtype != expected.dtype
