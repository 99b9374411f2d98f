"""Intent: what is asked of a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..registry import check_keys
from ..utils.text import shorten
from ..utils.validation import check_bool, check_mapping, check_number, check_text


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Ask for a dense teacher beside the model that is pruned.

    The loss becomes `task_weight * L + logits_weight * KL + hidden_weight * MSE + attention_weight * MSE`.

    Args:
        teacher: "self" for a frozen copy of the model as it is before pruning (fine-tune it first), else a folder or a
            Hub name.
        revision: branch, tag or commit of the teacher on the Hub.
        load_in_8bit: load the teacher through bitsandbytes in 8 bits; not for "self".
        temperature: of the soft targets.
        task_weight: of the loss that the model computes itself.
        logits_weight: of the soft targets, `losses.soft_target_kl`.
        hidden_weight: of the distance of hidden states, `losses.masked_mse`; teacher and student need the same width.
        attention_weight: of the distance of attention maps (TinyBERT), `losses.attention_mse`; needs
            attn_implementation="eager".
        cache: folder with the teacher's logits, written by `hf-sparse teach`; training reads them and does not run the
            teacher. Only logits can be cached.
        layer_map: "uniform" spreads the student's layers over the teacher's; "dynamic" matches them anew at each step
            (CoFi); or a list of pairs [student layer, teacher layer], counted from 0.

    Raises:
        RecipeError: for a weight below 0, a temperature that is not positive, an invalid `layer_map`, or no loss.

    Example:
        >>> import hf_sparse
        >>> hf_sparse.DistillationConfig(teacher="my/dense-bert", temperature=4.0).logits_weight
        0.9

    Source: weights and temperature of Lagunas et al. 2021, "Block Pruning For Faster Transformers", appendix.
    """

    teacher: str = "self"
    revision: str | None = None
    load_in_8bit: bool = False
    temperature: float = 2.0
    task_weight: float = 0.1
    logits_weight: float = 0.9
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
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
            check_number(f"distillation.{key}", getattr(self, key), "[0, inf)")
        if not (self.logits_weight or self.hidden_weight or self.attention_weight):
            raise RecipeError(
                "`distillation.logits_weight`, `hidden_weight` or `attention_weight` must be above 0, got 0 for all"
            )
        if self.cache is not None:
            self._check_cache()
        if not isinstance(self.layer_map, str):
            object.__setattr__(self, "layer_map", _as_pairs(self.layer_map))
        elif self.layer_map not in ("uniform", "dynamic"):
            raise _not_a_map(self.layer_map)

    def _check_cache(self) -> None:
        check_text("distillation.cache", self.cache)
        if self.hidden_weight or self.attention_weight:
            raise RecipeError(
                "`distillation.hidden_weight` and `attention_weight` must be 0 with `distillation.cache`, "
                "which holds only logits of the teacher. Set both to 0, or leave `cache` out to run the teacher"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without the keys that are at their default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not isinstance(self.layer_map, str):
            values["layer_map"] = [list(pair) for pair in self.layer_map]
        return {f.name: values[f.name] for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DistillationConfig:
        """Build from plain JSON types.

        Raises:
            RecipeError: for an unknown key, naming the nearest known one.
        """
        check_mapping("distillation", data)
        check_keys(data, [field.name for field in dataclasses.fields(cls)], "distillation")
        return cls(**data)


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
