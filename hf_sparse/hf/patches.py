"""All that hf_sparse replaces in transformers, accelerate, PEFT and sentence-transformers, in one table.

No other module assigns to a class, a module or an object of these libraries (a test looks). It calls `wrap`, `put`,
`append` or `on_registration` here with its function, and `PATCHES` has the row that says why. Each function passes what
it does not know through to the original, so a process that imports hf_sparse and does not use it works as before.

| function | changes | from when |
|---|---|---|
| `wrap` | a function of a class or a module, once per process | `import hf_sparse`; sentence-transformers: a save |
| `append` | a tuple of a module, once per process | `import hf_sparse` |
| `on_registration` | nothing of a library: torch calls it for each sub-module that a module gets | `import hf_sparse` |
| `put`, `take` | a method of one object | the object is sparse, or trains with a callback of hf_sparse |
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class Patch(NamedTuple):
    """One row: what is replaced, and why.

    Attributes:
        what: class or module, and the name in it, as `Trainer.train`.
        how: the function of this module that does it: "wrap", "put", "append" or "on_registration".
        why: what cannot be done otherwise.
        upstream: the issue that requests a supported way, or "none filed".
        until: when it can go.
    """

    what: str
    how: str
    why: str
    upstream: str
    until: str


_FOLDER = (
    "`load_state_dict` does not know which file its tensors are from, and the manifest is in the header of that file"
)
_LOADS = "Trainer loads checkpoints through `from_pretrained`, or has an event before it loads them"
_PUSH = "a push of a training folder uploads optimizer states and pickles, and its model is not packed"
_MERGE = "merging adds to `base_layer.weight` in place, so zeros of a sparse layer are lost"
_MERGES = "PEFT has an event after it merges into a layer"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "PreTrainedModel._load_pretrained_model",
        "wrap",
        "a quantizer can convert a weight after it was renamed and merged, but not decode it before",
        "none filed",
        "HfQuantizer can replace the slices of a checkpoint before they are renamed",
    ),
    Patch("Trainer._load_from_checkpoint", "wrap", _FOLDER, "none filed", _LOADS),
    Patch("Trainer._load_best_model", "wrap", _FOLDER, "none filed", _LOADS),
    Patch("transformers.trainer.load_sharded_checkpoint", "wrap", _FOLDER, "none filed", _LOADS),
    Patch("transformers.trainer_utils.load_sharded_checkpoint", "wrap", _FOLDER, "none filed", _LOADS),
    Patch(
        "Trainer.create_optimizer",
        "wrap",
        "learned scores need a parameter group before the scheduler counts groups and before a resume loads its state",
        "none filed",
        "TrainerCallback has events before and after the optimizer is made",
    ),
    Patch(
        "Trainer.train",
        "wrap",
        "a checkpoint of another run must be refused before it is loaded",
        "none filed",
        "TrainerCallback has an event before `resume_from_checkpoint` is loaded",
    ),
    Patch(
        "transformers.trainer.save_fsdp_model",
        "wrap",
        "masked weights have other names in a state dict; with whole state they are in `model.safetensors` already",
        "none filed",
        "Trainer saves and loads an FSDP2 model through `save_pretrained` and `load_state_dict`",
    ),
    Patch(
        "transformers.trainer.load_fsdp_model",
        "wrap",
        "it loads by names in memory, which masked weights do not have in a state dict, and would not load them",
        "none filed",
        "Trainer saves and loads an FSDP2 model through `save_pretrained` and `load_state_dict`",
    ),
    Patch(
        "transformers.quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES",
        "append",
        "a `quantization_config` of the caller is dropped for a checkpoint that has one, unless its class is listed",
        "none filed",
        "`register_quantization_config` puts a class on that list, or reads `get_loading_attributes` of any class",
    ),
    Patch(
        "AutoHfQuantizer.merge_quantization_configs",
        "wrap",
        "it warns that the `quantization_config` of the caller is ignored, and of ours nothing is",
        "none filed",
        "it does not warn where `get_loading_attributes` has all of the config",
    ),
    Patch(
        "PreTrainedModel.save_pretrained",
        "wrap",
        "a model that was made around a compacted part has no quantizer, and would save what nothing can load",
        "none filed",
        "a model is notified when one of its parts is replaced",
    ),
    Patch(
        "torch.nn.Module.register_module",
        "on_registration",
        "PEFT has no event when it wraps a layer or a model; the wrapper is given `merge` and the like below",
        "none filed",
        _MERGES,
    ),
    Patch("BaseTunerLayer.merge", "put", _MERGE, "none filed", _MERGES),
    Patch("BaseTunerLayer.unmerge", "put", _MERGE, "none filed", _MERGES),
    Patch("BaseTuner.merge_adapter", "put", "the lost part of the update is reported", "none filed", _MERGES),
    Patch("BaseTuner.merge_and_unload", "put", "the lost part of the update is reported", "none filed", _MERGES),
    Patch(
        "PreTrainedModel.save_pretrained",
        "put",
        "a quantizer has no part in how files are written: packed, described by a header, replaced when complete",
        "none filed",
        "HfQuantizer can write the files of `save_pretrained`",
    ),
    Patch(
        "PreTrainedModel.push_to_hub",
        "put",
        "it uploads what `save_pretrained` of the class writes",
        "none filed",
        "as `save_pretrained`",
    ),
    Patch(
        "BaseModel._create_model_card",
        "wrap",
        "sentence-transformers writes the cards of its models itself, and knows nothing of zeros",
        "none filed",
        "a module of sentence-transformers can add a section to the card",
    ),
    Patch("Trainer.push_to_hub", "put", _PUSH, "none filed", "TrainingArguments can say which files are pushed"),
    Patch(
        "Trainer._push_from_checkpoint", "put", _PUSH, "none filed", "TrainingArguments can say which files are pushed"
    ),
    Patch(
        "Trainer.save_model",
        "put",
        "a checkpoint written over must be marked incomplete first, and gets the masks of a wrapped model",
        "none filed",
        "Trainer writes checkpoints into a new folder and renames it",
    ),
    Patch(
        "Trainer._load_from_checkpoint", "put", "the masks of a wrapped model are loaded after it", "none filed", _LOADS
    ),
    Patch(
        "PreTrainedModel.forward",
        "put",
        "a model of sentence-transformers calls `forward` of the transformer in it, which no hook of torch sees",
        "none filed",
        "its Transformer module calls the model, or returns attention maps and hidden states on request",
    ),
    Patch(
        "Trainer.compute_loss",
        "put",
        "Trainers of sentence-transformers compute their loss from embeddings, outside of the model that is distilled",
        "none filed",
        "TrainerCallback has an event between the loss and its backward pass",
    ),
    Patch(
        "Trainer.get_batch_samples",
        "put",
        "a run that is resumed after its last step trains one more, since steps are compared after one is done",
        "none filed",
        "Trainer compares `global_step` with `max_steps` before the first step",
    ),
)


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function of a class or module; a second call does nothing.

    Args:
        owner: the class or module that has it.
        name: of the function.
        wrapper: called with the original and the arguments.

    Raises:
        AttributeError: if the library has no function of that name any more.
        KeyError: if `PATCHES` has no row for it.
    """
    _row(owner, name, "wrap")
    original = getattr(owner, name)
    if hasattr(original, "hf_sparse_original"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.hf_sparse_original = original  # type: ignore[attr-defined]
    static = isinstance(vars(owner).get(name), (staticmethod, classmethod))  # the original of these is bound already
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def append(owner: types.ModuleType, name: str, item: Any) -> None:
    """Put an item at the end of a tuple of a module; a second call does nothing.

    Where the tuple is gone, the library has another way, and a test of the item's effect fails.
    """
    _row(owner, name, "append")
    items = getattr(owner, name, ())
    if item not in items:
        setattr(owner, name, (*items, item))


def on_registration(hook: Callable[[nn.Module, str, nn.Module | None], None]) -> None:
    """Have torch call a function with parent, name and child whenever a module is given to another."""
    _row(nn.Module, "register_module", "on_registration")
    register_module_module_registration_hook(hook)


def put(obj: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of one object; a function that copies and pickles of the object need is a `partial`.

    Raises:
        KeyError: if `PATCHES` has no row for it.
    """
    _row(obj, name, "put")
    vars(obj)[name] = function


def take(obj: Any, name: str) -> None:
    """Take back what `put` has put there, if anything."""
    vars(obj).pop(name, None)


def _row(owner: Any, name: str, how: str) -> None:
    """Raise `KeyError` if the table has no row for what is to be replaced."""
    if how == "put":  # the class is a duck: Trainers and tuners of other libraries count as theirs
        known = any(patch.how == how and patch.what.endswith(f".{name}") for patch in PATCHES)
    else:
        known = any(patch.how == how and _ends_as(patch.what, owner, name) for patch in PATCHES)
    if not known:
        raise KeyError(f"PATCHES has no row for {name} of {owner!r}")


def _ends_as(what: str, owner: Any, name: str) -> bool:
    full = f"{owner.__name__ if isinstance(owner, types.ModuleType) else owner.__qualname__}.{name}"
    return what == full or what.endswith(f".{full}")
