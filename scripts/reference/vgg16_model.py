"""VGG16 as a model of transformers, and images as its convolutions were trained on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.modeling_outputs import ImageClassifierOutput

MEANS = (123.68, 116.779, 103.939)
"""Of red, green and blue, as the convolutions were trained."""


class VGG(nn.Module):
    """The layout of torchvision's VGG with a small classifier.

    Args:
        layers: filters of each convolution, and "M" for a pooling.
        hidden: width of the classifier.
        classes: outputs.
    """

    def __init__(self, layers: list[Any], hidden: int, classes: int) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 3
        for each in layers:
            if each == "M":
                modules.append(nn.MaxPool2d(2))
            else:
                modules += [nn.Conv2d(channels, each, 3, padding=1), nn.ReLU(inplace=True)]
                channels = each
        self.features = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `(batch, 3, height, width)`."""
        out: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return out


class VGGConfig(PretrainedConfig):
    """Sizes of a VGG."""

    model_type = "vgg"

    def __init__(self, layers: list[Any] | None = None, hidden: int = 512, **rest: Any) -> None:
        self.layers = layers or [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
        self.hidden: int = hidden
        super().__init__(**rest)


class VGGForImageClassification(PreTrainedModel):
    """A VGG as a model of transformers."""

    config_class = VGGConfig
    base_model_prefix = "vgg"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vgg = VGG(config.layers, config.hidden, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Return loss and logits."""
        logits = self.vgg(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("vgg", VGGConfig)
AutoModelForImageClassification.register(VGGConfig, VGGForImageClassification)


def images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return pixels as the convolutions take them, and labels."""
    table = datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")[:]
    files = [each["bytes"] if isinstance(each, dict) else each for each in table["image"]]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float32) for file in files])
    return torch.from_numpy(pixels - np.asarray(MEANS, dtype=np.float32)).permute(
        0, 3, 1, 2
    ).contiguous(), torch.tensor(table["label"])


def processor() -> ViTImageProcessorPil:
    """Return what prepares images as `images` does."""
    return ViTImageProcessorPil(
        size={"height": 32, "width": 32}, rescale_factor=1.0, image_mean=list(MEANS), image_std=[1.0, 1.0, 1.0]
    )
