"""VGG and ResNet: convolutions in a row. In a ResNet those inside a residual block; its ends are added to others."""

from __future__ import annotations

from .base import Family, register_family
from .filters import Filters

VGG = Family(
    "VGG (a `features` sequence and a `classifier`, as in torchvision)",
    filters=(Filters(frozenset({"VGG"}), sequence="features", reader="classifier.0"),),
    package="",
)

_TRANSFORMERS = tuple((f"layer.{number}.convolution", f"layer.{number}.normalization") for number in range(3))
_TIMM = tuple((f"conv{number}", f"bn{number}") for number in (1, 2, 3))

RESNET = Family(
    "ResNet (of transformers, and of timm and torchvision)",
    filters=(
        Filters(frozenset({"ResNetBasicLayer", "ResNetBottleNeckLayer"}), layers=_TRANSFORMERS),
        Filters(frozenset({"BasicBlock", "Bottleneck"}), layers=_TIMM),
    ),
    package="",
)

register_family(VGG)
register_family(RESNET)
