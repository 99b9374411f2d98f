"""`device_map`: where the parts of a model are while they are pruned block by block."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ...errors import RecipeError

Device: TypeAlias = str | int | torch.device
DeviceMap: TypeAlias = Device | Mapping[str, Device]

_WHOLE = ""
"""Key of the whole model, as in transformers."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where what is computed.

    Args:
        rest: the embeddings, and all that is computed outside of the blocks.
        blocks: each block, by name.
    """

    rest: torch.device
    blocks: Mapping[str, torch.device]


def check_device_map(device_map: DeviceMap) -> dict[str, torch.device]:
    """Return the device of each name; "" stands for the whole model.

    Raises:
        RecipeError: for anything but a device, and for one that is not there.

    Example:
        >>> check_device_map({"model": "cpu", "lm_head": "cpu"})
        {'model': device(type='cpu'), 'lm_head': device(type='cpu')}
    """
    if not isinstance(device_map, Mapping):
        return {_WHOLE: _device(device_map, "device_map", whole=True)}
    if not device_map or not all(isinstance(name, str) for name in device_map):
        raise RecipeError(f"`device_map` must map names of modules to devices, got {device_map!r:.200}")
    return {name: _device(value, f"device_map['{name}']", whole=False) for name, value in device_map.items()}


def _device(value: Any, where: str, whole: bool) -> torch.device:
    """Return a device that is there."""
    choices = "'auto', a device as in 'cpu' or 'cuda:1', or a mapping" if whole else "a device as in 'cpu' or 'cuda:1'"
    if value == "disk":
        raise RecipeError(
            f"`{where}` is 'disk', where nothing is computed. sparsify_checkpoint reads each block from the files of "
            f"the checkpoint when it is reached, so it needs no room for the others: give {choices}; with spill=True "
            "hidden states are in files too"
        )
    if value == "auto" and whole:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
        raise RecipeError(f"`{where}` must be {choices}, got {value!r:.200}")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        if isinstance(value, int):
            raise RecipeError(f"`{where}` is {value}, and torch has no such accelerator here ({error})") from None
        raise RecipeError(f"`{where}` must be {choices}, got {value!r:.200}") from None
    if device.type == "meta":
        raise RecipeError(f"`{where}` must be {choices}, got 'meta', which holds no values")
    return _there(device, where)


def _there(device: torch.device, where: str) -> torch.device:
    """Return a device if tensors can be put on it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RecipeError(f"`{where}` is '{device}', and torch has no such device here ({first:.200})") from None
    return device


def place(model: Any, blocks: Sequence[str], devices: Mapping[str, torch.device]) -> Placement:
    """Return where the parts of a model go.

    Args:
        model: of transformers.
        blocks: names of those that are computed.
        devices: by name of a module or a parameter, which stands for all inside it; the longest name counts.

    Raises:
        RecipeError: if the model has nothing of a name, a weight has no device, or a block has several.
    """
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in devices:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "It has " + ", ".join(_parts(model))
            raise RecipeError(f"`device_map` names '{name}', and {type(model).__name__} has no such module. {hint}")
    missed = [name for name, _ in model.named_parameters() if _of(name, devices) is None]
    if missed:
        raise RecipeError(
            f"`device_map` must cover the model, and '{missed[0]}' and {len(missed) - 1} more weights have no device. "
            "Add their modules, or the key '' for all that is not named"
        )
    table = model.get_input_embeddings()
    embeddings = next(name for name, module in model.named_modules() if module is table)
    rest = _of(f"{embeddings}.weight", devices)
    assert rest is not None
    return Placement(rest, {name: _of_block(model, name, devices) for name in blocks})


def _of_block(model: Any, block: str, devices: Mapping[str, torch.device]) -> torch.device:
    found = {_of(f"{block}.{name}", devices) for name, _ in model.get_submodule(block).named_parameters()}
    if len(found) > 1:
        listed = " and ".join(sorted(str(device) for device in found))
        raise RecipeError(
            f"`device_map` divides '{block}' between {listed}, and a block is calibrated and pruned on one device. Map "
            "the whole block"
        )
    (device,) = found
    assert device is not None
    return device


def _of(name: str, devices: Mapping[str, torch.device]) -> torch.device | None:
    """Return the device of a weight, by the longest name that it is in."""
    while name not in devices:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return devices[name]


def _parts(model: Any) -> list[str]:
    """Return names that cover a model, for a message."""
    return [f"'{outer}.{name}'" for outer, part in model.named_children() for name, _ in part.named_children()][:8] or [
        f"'{name}'" for name, _ in model.named_children()
    ]
