"""Intent: what is requested of a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..registry import Registry, Spec, check_keys
from ..utils.text import shorten
from ..utils.validation import check_bool, check_mapping, check_number, check_text

TERMS: Registry[Any] = Registry("distillation loss")
"""Declared here, on the lowest floor, and filled by `hf_sparse.distillation.terms`."""
LOGITS_WEIGHT = 0.9


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Ask for a dense teacher beside the model that is pruned.

    The loss becomes `task_weight * L + logits_weight * KL + hidden_weight * MSE + attention_weight * MSE`, and what
    `losses` adds. With `task_weight: 0` the data needs no labels.

    Args:
        teacher: "self" for a frozen copy of the model as it is before pruning (fine-tune it first), else a folder or a
            Hub name.
        revision: branch, tag or commit of the teacher on the Hub.
        load_in_8bit: load the teacher through bitsandbytes in 8 bits; not for "self".
        temperature: of the soft targets.
        task_weight: of the loss that the model (or the Trainer) computes itself; 0 = it is not computed.
        logits_weight: of the soft targets, `losses.soft_target_kl`. None = 0.9, or 0 where `losses` is given. A model
            of embeddings has no logits: there the default is "embedding_cosine" with the same weight.
        hidden_weight: of the distance of hidden states, `losses.masked_mse`; teacher and student need the same width.
        attention_weight: of the distance of attention maps (TinyBERT), `losses.attention_mse`; needs
            attn_implementation="eager".
        losses: more losses by name with their weights, as in `{"embedding_cosine": 1.0, "embedding_similarity": 5.0}`;
            one with options is a mapping, `{"weight": 1.0, ...}`. Names: those of `TERMS`.
        cache: folder with the teacher's logits or embeddings, written by `hf-sparse cache-teacher`; training reads them
            and does not run the teacher. Nothing else can be cached.
        layer_map: "uniform" spreads the student's layers over the teacher's; "dynamic" matches them anew at each step
            (CoFi); or a list of pairs [student layer, teacher layer], counted from 0.

    Raises:
        RecipeError: for a weight below 0, a temperature that is not positive, an invalid `layer_map`, or no loss.

    Example:
        >>> import hf_sparse
        >>> hf_sparse.DistillationConfig(teacher="my/dense-bert", temperature=4.0).weights()
        {'logits': 0.9}

    Source: weights and temperature of Lagunas et al. 2021, "Block Pruning For Faster Transformers", appendix.
    """

    teacher: str = "self"
    revision: str | None = None
    load_in_8bit: bool = False
    temperature: float = 2.0
    task_weight: float = 0.1
    logits_weight: float | None = None
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    losses: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: str | None = None
    layer_map: str | Sequence[Sequence[int]] = "uniform"

    def __post_init__(self) -> None:
        check_text("distillation.teacher", self.teacher)
        check_bool("distillation.load_in_8bit", self.load_in_8bit)
        if self.load_in_8bit and self.teacher == "self":
            raise RecipeError(
                "`distillation.load_in_8bit` must be false for the teacher 'self', which is not loaded; "
                "name a folder or a model on the Hub as teacher"
            )
        check_number("distillation.temperature", self.temperature, "(0, inf)")
        for key in ("task_weight", "logits_weight", "hidden_weight", "attention_weight"):
            if getattr(self, key) is not None:
                check_number(f"distillation.{key}", getattr(self, key), "[0, inf)")
        check_mapping("distillation.losses", self.losses)
        object.__setattr__(self, "losses", {name: _checked(name, spec) for name, spec in self.losses.items()})
        if not self.weights():
            raise RecipeError(
                "`distillation.logits_weight`, `hidden_weight`, `attention_weight` or one of `losses` must be above 0, "
                "got 0 for all"
            )
        if self.cache is not None:
            self._check_cache()
        if not isinstance(self.layer_map, str):
            object.__setattr__(self, "layer_map", _as_pairs(self.layer_map))
        elif self.layer_map not in ("uniform", "dynamic"):
            raise _not_a_map(self.layer_map)

    def _check_cache(self) -> None:
        check_text("distillation.cache", self.cache)
        if missing := [name for name in self.weights() if not TERMS[name].cached]:
            raise RecipeError(
                f"`distillation.losses`: the weight of {', '.join(missing)} must be 0 with `distillation.cache`, which "
                "holds only logits and embeddings of the teacher. Leave the loss out, or leave `cache` out to run the "
                "teacher"
            )

    def weights(self, embeds: bool = False) -> dict[str, float]:
        """Return the losses that count, by name, with their weights.

        Args:
            embeds: whether the model returns embeddings and no logits.

        Example:
            >>> import hf_sparse
            >>> hf_sparse.DistillationConfig(hidden_weight=0.5).weights(embeds=True)
            {'embedding_cosine': 0.9, 'hidden': 0.5}
        """
        default = 0.0 if self.losses else LOGITS_WEIGHT
        first = "embedding_cosine" if embeds and self.logits_weight is None else "logits"
        found = {
            first: default if self.logits_weight is None else self.logits_weight,
            "hidden": self.hidden_weight,
            "attention": self.attention_weight,
        }
        for name, spec in self.losses.items():
            found[name] = found.get(name, 0.0) + (spec["weight"] if isinstance(spec, Mapping) else spec)
        return {name: weight for name, weight in found.items() if weight}

    def spec(self, name: str) -> Spec:
        """Return a loss with its options, for `TERMS.build`."""
        given = self.losses.get(name)
        options = {key: value for key, value in given.items() if key != "weight"} if isinstance(given, Mapping) else {}
        return {"name": name, **options}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without the keys that are at their default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not isinstance(self.layer_map, str):
            values["layer_map"] = [list(pair) for pair in self.layer_map]
        plain = {f.name: values[f.name] for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {key: value for key, value in plain.items() if key != "losses" or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillationConfig:
        """Build from plain JSON types.

        Raises:
            RecipeError: for an unknown key, naming the nearest known one.
        """
        check_mapping("distillation", data)
        check_keys(data, [field.name for field in dataclasses.fields(cls)], "distillation")
        return cls(**data)


def _checked(name: str, spec: Any) -> Any:
    """Return the weight of a loss, or its mapping, if it can be built."""
    weight = spec.get("weight", 1.0) if isinstance(spec, Mapping) else spec
    check_number(f"distillation.losses.{name}", weight, "[0, inf)")
    options = {key: value for key, value in spec.items() if key != "weight"} if isinstance(spec, Mapping) else {}
    TERMS.build({"name": name, **options})
    return {**options, "weight": float(weight)} if options else float(weight)


def _as_pairs(value: Any) -> tuple[tuple[int, int], ...]:
    pairs = value if isinstance(value, (list, tuple)) else ()
    good = all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        for pair in pairs
    )
    if not pairs or not good:
        raise _not_a_map(value)
    return tuple((pair[0], pair[1]) for pair in pairs)


def _not_a_map(value: Any) -> RecipeError:
    return RecipeError(
        "`distillation.layer_map` must be 'uniform', 'dynamic' or a list of pairs [student layer, teacher layer], "
        f"counted from 0, got {shorten(value)}"
    )
