"""The tensors that a packed file holds: collected from the model, named as in the file, encoded.

A model that is still being pruned writes its training state too (removed values, scores), in the same file, so that the
checkpoint of a Trainer is one consistent thing: `from_pretrained` reads the masked model out of it, and
`resume_from_checkpoint` the whole state.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...errors import RecipeError
from ...formats.codecs import SUFFIXES, encode
from ...formats.codecs.base import pack_bits
from ...formats.layer_forms import FORMS_KEY
from ...formats.manifest import Manifest, TensorEntry
from ...formats.structure import EDITS_KEY
from ...modeling.model_state import sparse_weights
from ...modeling.ownership import names_of
from ...pruning.compaction import edits_of
from ...pruning.compressions.saved_forms import forms_of
from ...pruning.shards import whole
from ...pruning.state_fields import state_suffixes

FORMATS = {"packed": "auto", "smallest": "smallest", "dense": "dense"}
"""Formats of `save_pretrained` and `convert`, and the codec of the sparse weights in each."""


class _Stored(NamedTuple):
    """A tensor under its key in the file.

    Attributes:
        key: in the file.
        tensor: on the meta device if it is offloaded.
        name: in memory; None if it was merged, split or rearranged from tensors in memory.
        target: whether it was requested to be sparse.
    """

    key: str
    tensor: Tensor
    name: str | None
    target: bool


class Share:
    """The tensors that one of several processes packs: about as many bytes as each other one.

    Every process has to ask for the same tensors in the same order.
    """

    def __init__(self, rank: int, processes: int) -> None:
        self._rank = rank
        self._bytes = [0] * processes

    def takes(self, tensor: Tensor) -> bool:
        """Return whether the next tensor is packed here."""
        owner = self._bytes.index(min(self._bytes))
        self._bytes[owner] += tensor.nbytes
        return owner == self._rank


class Packed(NamedTuple):
    """The tensors that were packed here.

    Attributes:
        tensors: to write, under the names of the checkpoint format of the model.
        entries: of the manifest, by the place of the tensor in the whole model.
        targets: keys of the weights that were requested to be sparse, of the whole model.
        extra: of the manifest.
    """

    tensors: dict[str, Tensor]
    entries: dict[int, dict[str, TensorEntry]]
    targets: tuple[str, ...]
    extra: dict[str, Any]

    def manifest(self, others: Iterable[Mapping[int, Mapping[str, TensorEntry]]] = ()) -> Manifest:
        """Return the manifest of the whole model.

        Args:
            others: entries of what other processes have packed.
        """
        places = {place: entries for part in (self.entries, *others) for place, entries in part.items()}
        found = {key: entry for place in sorted(places) for key, entry in places[place].items()}
        return Manifest(found, targets=self.targets, extra=self.extra)


def pack_state(
    model: PreTrainedModel, state: Mapping[str, Tensor], codec: str = "auto"
) -> tuple[dict[str, Tensor], Manifest]:
    """Pack the weights that were requested to be sparse, and list every tensor in a manifest.

    Args:
        state: of the model, with the keys that `masking` gives masked weights.
        codec: of the weights that are not in training, see `codecs.encode`.

    Returns:
        The tensors to write, under the names of the checkpoint format of the model, and the manifest.

    Raises:
        RecipeError: if the model has a tensor of its own under the name of a part.
    """
    packed = pack_share(model, state, _collected(model, state), codec, Share(0, 1))
    return packed.tensors, packed.manifest()


def pack_share(
    model: PreTrainedModel, state: Mapping[str, Tensor], plain: Mapping[str, Tensor], codec: str, share: Share
) -> Packed:
    """Pack the share of one of several processes, as `pack_state` packs all.

    Every process has to call it. Sharded tensors are gathered one at a time.

    Args:
        plain: what is to be saved by its name in memory (`keys_to_save`).
    """
    packed = Packed({}, {}, (), {})
    targets: list[str] = []
    written: set[str] = set()
    stored = list(_stored(model, plain))
    for place, (key, tensor, name, target) in enumerate(stored):
        mine = share.takes(tensor)
        training = {} if name is None or not target else _training_parts(state, name)
        tensor = whole(tensor)
        written |= {name} if name is not None and training else set()
        if target:
            targets.append(key)
        if not mine:
            continue
        if name is not None and tensor.is_meta:
            tensor = load_offloaded_parameter(model, name)
        entry, parts = encode(tensor, ("bitmask" if training else codec) if target else "dense")
        entries = packed.entries[place] = {key: entry}
        packed.tensors.update({key + suffix: part for suffix, part in parts.items()})
        _write_training(packed.tensors, entries, key, training)
    # Of a weight that is merged, split or rearranged on loading (stacked experts) it keeps the name in memory.
    for place, name in enumerate(sorted((_in_training(state) & plain.keys()) - written), len(stored)):
        mine, training = share.takes(state[name]), _training_parts(state, name)
        if mine:
            _write_training(packed.tensors, packed.entries.setdefault(place, {}), name, training)
    edits = edits_of(model)
    extra = {EDITS_KEY: edits.to_dict()} if edits else {}
    if forms := forms_of(model):
        extra[FORMS_KEY] = forms.to_dict()
    return packed._replace(targets=tuple(targets), extra=extra)


def keys_to_save(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[str]:
    """Return the names in memory of the tensors to save: of tied ones, one."""
    return list(_collected(model, state))


def _write_training(
    tensors: dict[str, Tensor], entries: dict[str, TensorEntry], owner: str, parts: Mapping[str, Tensor]
) -> None:
    """Add the training state of a weight to the tensors and entries of a file."""
    for suffix, part in parts.items():
        entries[owner + suffix], dense = encode(part, "dense")
        tensors[owner + suffix] = dense[""]


def _in_training(state: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the weights that have a training state."""
    kept = (key.removesuffix("_kept") for key in state if key.endswith("_kept") and is_training_state(key, state))
    return {name for name in kept if name in state}


def _collected(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is to be saved by its name in memory: tied tensors once, and no training state."""
    plain = dense_state(model, state)
    for ignored in model._keys_to_ignore_on_save or ():
        plain.pop(ignored, None)
    plain = _untied(remove_tied_weights_from_state_dict(plain, model), model)
    # Weights that are offloaded are read one at a time, by `pack_state`; only where stored tensors are computed from
    # several of memory (experts that are merged, say) all have to be there at once.
    if any(isinstance(rule, WeightConverter) for rule in getattr(model, "_weight_conversions", None) or ()):
        plain = {key: load_offloaded_parameter(model, key) if t.is_meta else t for key, t in plain.items()}
    return plain


def _stored(model: PreTrainedModel, plain: Mapping[str, Tensor]) -> Iterator[_Stored]:
    """Yield the tensors as the checkpoint format of the model has them, in the order of their keys.

    Raises:
        RecipeError: if a tensor has a name that loading takes for a part of another.
    """
    marked = sparse_weights(model, aliases=True)
    # Of a weight that is tied, the file has another name than the model was pruned under.
    tied = {name for key in marked for name in _tied_names(model, key)}
    wanted = {name for name in (*marked, *tied) if name in plain}
    names = {id(tensor): name for name, tensor in plain.items()}
    stored = revert_weight_conversion(model, dict(plain))  # packing comes after that renaming
    _refuse_taken_names(stored)
    converted = wanted - {names.get(id(tensor)) for tensor in stored.values()}
    sources = _sources(model, plain, converted) if converted else set()
    for key, tensor in sorted(stored.items()):
        name = names.get(id(tensor))
        yield _Stored(key, tensor, name, name in wanted or key in sources)


def _tied_names(model: PreTrainedModel, name: str) -> list[str]:
    path, _, attribute = name.rpartition(".")
    weight = model.get_submodule(path)._parameters.get(attribute)
    return [] if weight is None else names_of(model, weight)


def _sources(model: PreTrainedModel, plain: Mapping[str, Tensor], converted: set[str]) -> set[str]:
    """Return the keys of the stored tensors that hold values of converted weights (merged, split, permuted)."""
    marks = {key: torch.tensor(key in converted).expand(tensor.shape) for key, tensor in plain.items()}
    return {key for key, mark in revert_weight_conversion(model, marks).items() if bool(mark.any())}


def _untied(plain: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Drop tied weights that transformers missed: each forward pass makes the offloaded ones other objects."""
    for twin, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if twin in plain and kept in plain and (plain[twin].is_meta or plain[kept].is_meta):
            values = [load_offloaded_parameter(model, k) if plain[k].is_meta else plain[k] for k in (twin, kept)]
            if torch.equal(values[0].cpu(), values[1].cpu()):
                plain.pop(twin)
    return plain


def is_training_state(key: str, keys: Container[str]) -> bool:
    """Return whether a key is of the training state of a weight, and not of a tensor that the model itself calls so.

    Args:
        keys: all that there are. Every weight in training has its `_kept` and `_hidden` among them; it is there itself
            under that name unless a file holds it merged or split.

    Example:
        >>> keys = {"w", "w_kept", "w_hidden", "v", "v_hidden"}
        >>> [is_training_state(key, keys) for key in ("w_hidden", "v_hidden")]
        [True, False]
    """
    if not key.endswith(state_suffixes()):
        return False
    owner = key[: key.rindex("_")]
    return all(each in keys for each in (f"{owner}_kept", f"{owner}_hidden"))


def _refuse_taken_names(stored: Mapping[str, Tensor]) -> None:
    """Raise `RecipeError` if a tensor has a name that loading takes for a part of another."""
    for key in stored:
        for suffix in filter(None, (*SUFFIXES, *state_suffixes())):
            owner = key.removesuffix(suffix)
            if owner != key and owner.rpartition(".")[2] == "weight" and owner in stored:
                raise RecipeError(
                    f"the model has a tensor '{key}' of its own, and packed files keep a part of '{owner}' under that "
                    "name. Save it with format='dense', or give that tensor another name"
                )


def _training_parts(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the training state of a weight as it goes to disk, by suffix: nothing that the weight itself holds."""
    parts = {suffix: whole(state[name + suffix]).cpu() for suffix in state_suffixes() if name + suffix in state}
    if parts:
        removed = ~parts["_kept"]
        parts["_hidden"] = parts["_hidden"][removed]
        parts["_kept"] = torch.from_numpy(pack_bits((~removed).view(-1).numpy()))
    return parts


def dense_state(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of the masked model with plain dense weights and nothing else."""
    state = model.state_dict() if state is None else state
    return {key: tensor for key, tensor in state.items() if not is_training_state(key, state)}
