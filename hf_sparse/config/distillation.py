"""Intent: what is asked of a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..registry import check_keys


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
        if not isinstance(self.teacher, str) or not self.teacher:
            raise RecipeError(f"distillation: teacher is 'self', a folder or a Hub name, not {self.teacher!r}")
        if not isinstance(self.load_in_8bit, bool) or (self.load_in_8bit and self.teacher == "self"):
            raise RecipeError(
                "distillation: load_in_8bit is true or false, and for a teacher that is loaded (folder or Hub name)"
            )
        for key in ("temperature", "task_weight", "logits_weight", "hidden_weight", "attention_weight"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
                raise RecipeError(f"distillation: {key} is a number from 0 on, not {value!r}")
        if not self.temperature:
            raise RecipeError("distillation: temperature is above 0, not 0")
        if not (self.logits_weight or self.hidden_weight or self.attention_weight):
            raise RecipeError("distillation: all weights of the teacher are 0, so nothing would be learned from it")
        if self.cache is not None:
            self._check_cache()
        if not isinstance(self.layer_map, str):
            object.__setattr__(self, "layer_map", _as_pairs(self.layer_map))
        elif self.layer_map not in ("uniform", "dynamic"):
            raise RecipeError(
                f"distillation: layer_map is 'uniform', 'dynamic' or a list of pairs, not {self.layer_map!r}"
            )

    def _check_cache(self) -> None:
        if not isinstance(self.cache, str) or not self.cache:
            raise RecipeError(f"distillation: cache is the folder that `hf-sparse teach` wrote, not {self.cache!r}")
        if self.hidden_weight or self.attention_weight:
            raise RecipeError(
                "distillation: a cache holds the teacher's logits alone, but hidden_weight or attention_weight asks "
                "for more. Set both to 0, or leave cache out and let the teacher run beside the model"
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
        if not isinstance(data, Mapping):
            raise RecipeError(f"distillation is a mapping with keys such as teacher and temperature, not {data!r}")
        check_keys(data, [field.name for field in dataclasses.fields(cls)], "distillation")
        return cls(**data)


def _as_pairs(value: Any) -> tuple[tuple[int, int], ...]:
    pairs = value if isinstance(value, (list, tuple)) else ()
    good = all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        for pair in pairs
    )
    if not pairs or not good:
        raise RecipeError(
            f"distillation: layer_map is 'uniform', 'dynamic' or a list of pairs [student, teacher] of layer numbers "
            f"from 0, not {value!r}"
        )
    return tuple((pair[0], pair[1]) for pair in pairs)
