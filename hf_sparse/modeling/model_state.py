"""The attributes that hf_sparse hangs on the modules and parameters of its users: all of them, in one place.

| attribute | on | holds | removed by |
|---|---|---|---|
| `hf_sparse_weights` | a model, pruned or loaded | names of the weights meant to be sparse | `fill`, `dequantize` |
| `hf_sparse_edits` | the model that was compacted | the `Edits` that made its shape | never |
| `hf_sparse_heads_per_kv` | an attention with grouped queries | heads that read each KV head, if uneven | never |
| `hf_sparse_zero_guard` | a layer | what keeps the zeros of its weights | `free_zeros` (`fill`, attaching) |
| `hf_sparse_masks_beside` | a layer that DeepSpeed ZeRO-3 partitions | the masks of its weights | `bake`, `detach` |
| `hf_sparse_kept` | a layer of PEFT | which entries of the weight below are not zero, as bits | never |
| `hf_sparse_update` | a layer that adapters were merged into | norms of the update | `unmerge` |
| `hf_sparse_decode` | a parameter | how a lazy weight is decoded | its materialization |
| `hf_sparse_runtime_frozen` | a model in runtime form | what trained before, by name | `to_dense_runtime` |
| `_apply`, `_load_from_state_dict` | modules of a runtime model | refusals | `to_dense_runtime` |
| `fused_core`, `fused_block`, `fused_ffn` | modules that the runtime fuses | their parts | `to_dense_runtime` |

All are plain attributes, so `copy.deepcopy` takes them along. None is a parameter, a buffer or a submodule, so a state
dict has none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ..errors import RecipeError
from ..utils.text import shorten

T = TypeVar("T")


class Attribute(Generic[T]):
    """One attribute of the table above.

    Args:
        name: of the attribute.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> SPARSE_WEIGHTS.set(layer, ("weight",))
        >>> SPARSE_WEIGHTS.get(layer), SPARSE_WEIGHTS.pop(layer), SPARSE_WEIGHTS.get(layer)
        (('weight',), ('weight',), None)
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, owner: nn.Module | Tensor) -> T | None:
        """Return the value on this very object, never that of something it wraps; None = there is none."""
        value: T | None = vars(owner).get(self.name)
        return value

    def set(self, owner: nn.Module | Tensor, value: T) -> None:
        """Put a value on an object."""
        vars(owner)[self.name] = value

    def pop(self, owner: nn.Module | Tensor) -> T | None:
        """Take the value off an object and return it; None = there was none."""
        value: T | None = vars(owner).pop(self.name, None)
        return value


SPARSE_WEIGHTS: Attribute[tuple[str, ...]] = Attribute("hf_sparse_weights")
EDITS: Attribute[Any] = Attribute("hf_sparse_edits")
ZERO_GUARD: Attribute[Any] = Attribute("hf_sparse_zero_guard")
MASKS_BESIDE: Attribute[dict[str, Any]] = Attribute("hf_sparse_masks_beside")
KEPT: Attribute[Tensor] = Attribute("hf_sparse_kept")
UPDATE: Attribute[tuple[float, float]] = Attribute("hf_sparse_update")
DECODE: Attribute[Any] = Attribute("hf_sparse_decode")
HEADS_PER_KV: Attribute[tuple[int, ...]] = Attribute("hf_sparse_heads_per_kv")
RUNTIME_FROZEN: Attribute[dict[str, nn.Parameter]] = Attribute("hf_sparse_runtime_frozen")


def check_model(model: object) -> None:
    """Raise `RecipeError` for what is not a module: a name or a folder, a config, a class.

    Example:
        >>> check_model("bert-base-uncased")
        Traceback (most recent call last):
        hf_sparse.errors.RecipeError: `model` must be a torch.nn.Module, got 'bert-base-uncased'
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(f"`model` must be a torch.nn.Module, got {shorten(model)}")


def sparse_weights(model: nn.Module, aliases: bool = False) -> tuple[str, ...]:
    """Return the names of the weights of a model that are meant to be sparse, in the order of its modules.

    A part that was pruned or loaded by itself (an encoder that a larger model was built around) counts too.

    Args:
        aliases: give a weight of a module with several names under all of them; False = under the first.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        >>> mark_sparse_weights(model[1], ["0.weight"])
        >>> sparse_weights(model)
        ('1.0.weight',)
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    marked: dict[nn.Module, set[str]] = {}
    for prefix, module in owners.items():
        for name in SPARSE_WEIGHTS.get(module) or ():
            path, _, own = f"{prefix}.{name}".strip(".").rpartition(".")
            if path in owners:
                marked.setdefault(owners[path], set()).add(own)
    paths = owners if aliases else dict(model.named_modules())
    return tuple(f"{path}.{own}".strip(".") for path, module in paths.items() for own in sorted(marked.get(module, ())))


def is_marked(model: nn.Module) -> bool:
    """Return whether a model, or a part of it, was given masks or was loaded sparse."""
    return any(SPARSE_WEIGHTS.get(module) is not None for module in model.modules())


def mark_sparse_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Add names to the weights of a model that are meant to be sparse; those of an earlier pruning stay."""
    SPARSE_WEIGHTS.set(model, (*sparse_weights(model), *names))
    SPARSE_WEIGHTS.set(model, sparse_weights(model))  # in the order of the model, each once


def unmark_sparse_weights(model: nn.Module) -> None:
    """Forget which weights of a model, and of its parts, are meant to be sparse."""
    for module in model.modules():
        SPARSE_WEIGHTS.pop(module)
