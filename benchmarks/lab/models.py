"""The networks that are measured, each built when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Network:
    """How to build a network, with images of size x size and batches of what they are measured
    with."""

    build: Callable[[], nn.Module]
    size: int
    batch: int

    def made(
        self, count: int, most: int | None = None, device: str | torch.device = "cpu"
    ) -> tuple[nn.Module, Batches]:
        """The network in eval mode and `count` batches of at most `most` samples, on the device;
        the same at every call."""
        torch.manual_seed(0)
        model = self.build().eval().to(device)
        n = self.batch if most is None else min(most, self.batch)
        batches = [
            (
                torch.randn(n, 3, self.size, self.size).to(device),
                torch.randint(0, 10, (n,)).to(device),
            )
            for _ in range(count)
        ]
        return model, batches


def resnet18(channels: int = 3, classes: int = 10) -> nn.Module:
    """With the stem that is usual for 32 x 32: one 3 x 3 convolution, no pooling."""
    import torchvision

    model: nn.Module = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vgg16_cifar() -> nn.Module:
    """VGG-16 with one linear layer behind the convolutions."""
    import torchvision

    model: nn.Module = torchvision.models.vgg16_bn(num_classes=10)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


def plain_cnn() -> nn.Module:
    """Convolutions and linear layers alone, which every library serves."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))


def small_cnn() -> nn.Module:
    """A network of 20 million multiplications an image, half of a ResNet-20's."""
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    """How to build a network of torchvision for ten classes."""

    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10)

    return build


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """How to build a network of timm for ten classes."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return build


ON_CPU = {
    "resnet18": Network(resnet18, 32, 32),
    "vgg16_bn (CIFAR head)": Network(vgg16_cifar, 32, 32),
    "vgg16_bn (134M)": Network(torchvision_model("vgg16_bn"), 32, 16),
    "resnet50": Network(torchvision_model("resnet50"), 64, 32),
    "vit_tiny": Network(timm_model("vit_tiny_patch16_224", img_size=96), 96, 32),
    "convnext_atto": Network(timm_model("convnext_atto"), 96, 32),
    "swin_tiny": Network(timm_model("swin_tiny_patch4_window7_224", img_size=112), 112, 32),
    "mobilenetv3_small": Network(timm_model("mobilenetv3_small_100"), 96, 32),
}
ON_GPU = {
    "resnet18": Network(resnet18, 32, 512),
    "resnet50": Network(torchvision_model("resnet50"), 224, 64),
    "vit_base": Network(timm_model("vit_base_patch16_224"), 224, 64),
    "convnext_tiny": Network(timm_model("convnext_tiny"), 224, 64),
}


def of_device(
    device: str | torch.device, on_cpu: dict[str, Network] | None = None
) -> dict[str, Network]:
    """The table of networks that a device bears; `on_cpu` takes the place of the CPU's."""
    return (on_cpu or ON_CPU) if torch.device(device).type == "cpu" else ON_GPU
