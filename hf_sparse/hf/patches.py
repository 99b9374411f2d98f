"""Every function of another library that hf_sparse replaces, in one table.

Each wrapper passes what it does not know through to the original, so a process that imports hf_sparse and does not use
it works as before. `install` puts them in place once, on `import hf_sparse`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import transformers.trainer
import transformers.trainer_utils
from transformers import PreTrainedModel, Trainer

from .quantization.quantizer import load_pretrained
from .quantization.state_dict import load_best_model, load_from_checkpoint, load_sharded


class Patch(NamedTuple):
    """One replaced function.

    Attributes:
        owner: the class or module that has it.
        name: of the function.
        wrapper: called with the original and the arguments.
        why: what cannot be done otherwise.
        upstream: issue that asks for a supported way, or "none filed".
        until: when it can go.
    """

    owner: Any
    name: str
    wrapper: Callable[..., Any]
    why: str
    upstream: str
    until: str


_FOLDER = "a model is not told which file a state dict comes from, and the manifest is in its header"
_LOADS = "Trainer loads checkpoints through from_pretrained, or a callback is called before they are loaded"

PATCHES: tuple[Patch, ...] = (
    Patch(
        PreTrainedModel,
        "_load_pretrained_model",
        load_pretrained,
        "a quantizer can convert a weight after it was renamed and merged, but not decode it before",
        "none filed",
        "HfQuantizer can replace the slices of a checkpoint before they are renamed",
    ),
    Patch(Trainer, "_load_from_checkpoint", load_from_checkpoint, _FOLDER, "none filed", _LOADS),
    Patch(Trainer, "_load_best_model", load_best_model, _FOLDER, "none filed", _LOADS),
    Patch(transformers.trainer, "load_sharded_checkpoint", load_sharded, _FOLDER, "none filed", _LOADS),
    Patch(transformers.trainer_utils, "load_sharded_checkpoint", load_sharded, _FOLDER, "none filed", _LOADS),
)


def install() -> None:
    """Replace the functions of the table; a second call does nothing.

    Raises:
        AttributeError: if a library has no function of that name any more.
    """
    for patch in PATCHES:
        original = getattr(patch.owner, patch.name)
        if not hasattr(original, "hf_sparse_original"):
            setattr(patch.owner, patch.name, _wrapped(patch, original))


def _wrapped(patch: Patch, original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return patch.wrapper(original, *args, **kwargs)

    wrapper.hf_sparse_original = original  # type: ignore[attr-defined]
    static = isinstance(vars(patch.owner).get(patch.name), staticmethod)
    return staticmethod(wrapper) if static else wrapper
