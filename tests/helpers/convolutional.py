"""Tiny models with convolutions: a VGG of our own as a model of transformers, its ResNet, and ViT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

LABELS = 4


class VGG(nn.Module):
    """The layout of torchvision's VGG."""

    def __init__(self, widths: tuple[int, ...], norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(widths[-1] * 4, 8), nn.ReLU(), nn.Linear(8, LABELS))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return out


class TinyVGGConfig(PretrainedConfig):
    model_type = "tiny-vgg"

    def __init__(self, widths: tuple[int, ...] = (6, 8, 10), norm: bool = True, **rest: Any) -> None:
        self.widths, self.norm = tuple(widths), norm
        super().__init__(**rest)


class TinyVGGForImageClassification(PreTrainedModel):
    config_class = TinyVGGConfig
    base_model_prefix = "vgg"
    main_input_name = "pixel_values"

    def __init__(self, config: TinyVGGConfig) -> None:
        super().__init__(config)
        self.vgg = VGG(config.widths, config.norm)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        logits = self.vgg(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _resnet(kind: str) -> Callable[[], Any]:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "num_labels": LABELS}
    return lambda: ResNetForImageClassification(ResNetConfig(**sizes, layer_type=kind))


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": LABELS}
FAMILIES: dict[str, Callable[[], Any]] = {
    "vgg": lambda: TinyVGGForImageClassification(TinyVGGConfig()),
    "vgg-plain": lambda: TinyVGGForImageClassification(TinyVGGConfig(norm=False)),
    "resnet": _resnet("basic"),
    "resnet-bottleneck": _resnet("bottleneck"),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VISION)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**VISION)),
}


def build(name: str) -> Any:
    """Return a model in `eval()`, the same one each time, whose batch norms change what they are given."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model.eval()


def images(count: int = 3) -> Tensor:
    """Return images of 32 x 32, the same ones each time."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def outputs(model: Any) -> Tensor:
    """Return the logits of `images`."""
    logits: Tensor = model(pixel_values=images()).logits
    return logits
