"""Hashed weights: a fraction of the values, shared by a hash of row and column."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

from torch import nn

from ...config.sparsity import COMPRESSIONS
from ...errors import RecipeError
from ...modeling.forms import embedding_scale, hashed_like, plain_weight, replace_layer
from ...utils.validation import check_number, check_one_of
from ..scorers.base import check_seed
from .base import Compression


@COMPRESSIONS.register("hashed")
@dataclasses.dataclass
class Hashed(Compression):
    """Let the entries of each matrix share `ratio` times as many values.

    Each layer has a hash of its own, made of the seed and its name. There is no sparse weight and nothing to schedule:
    the layers are replaced before training, which starts from the nearest hashed matrix.

    Args:
        ratio: values for each entry, in (0, 1); a fraction such as "1/8" too.
        seed: of the hash.
        start: "means" of the entries of each bucket of the trained weight; "random" for training from scratch, where
            means would be too small.

    Source: Chen et al. 2015, "Compressing Neural Networks with the Hashing Trick", sections 4 and 5.
    """

    form = "hashed"
    ratio: Any = 0.125
    seed: int = 0
    start: str = "means"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, str):
            try:
                self.ratio = float(Fraction(self.ratio.replace(" ", "")))
            except (ValueError, ZeroDivisionError):
                raise RecipeError(f'`ratio` must be a number or a fraction such as "1/8", got {self.ratio!r}') from None
        check_number("ratio", self.ratio, "(0, 1)")
        check_seed(self.seed)
        check_one_of("start", self.start, ("means", "random"))

    def replace(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        weight = plain_weight(layer)
        new = hashed_like(layer, max(1, int(self.ratio * weight.numel())), self.layer_seed(name))
        if self.start == "means":
            new.fit(weight)
        replace_layer(model, name, new)

    def layer_seed(self, name: str) -> int:
        """Return the seed of one layer, so that layers of one shape do not share a hash."""
        number = self.seed
        for byte in name.encode():
            number = (number * 1_000_003 + byte) % (1 << 62)
        return number

    def check(self, layer: nn.Module, name: str) -> None:
        super().check(layer, name)
        if isinstance(layer, nn.Embedding):
            embedding_scale(layer, f"'{name}'")
