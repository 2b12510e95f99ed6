"""The networks of the tables by name, untrained: for any number of input channels and classes."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.lab.data import Kind
from benchmarks.lab.models import resnet18
from examples.cifar10 import ResNet

SMALL = {
    "resnet8-narrow": (8, (8, 16, 32)),
    "resnet8": (8, (16, 32, 64)),
    "resnet20": (20, (16, 32, 64)),
}
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (width, convolutions) of each stage
CONV4 = (32, 64, 128, 256)  # widths
NETWORKS = ("resnet18", "vgg16", "conv4", *SMALL)


def network(name: str, kind: Kind, *, seed: int) -> nn.Module:
    """An untrained network, drawn by the seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in SMALL:
            return _small(name, kind)
        if name == "resnet18":
            return resnet18(kind.channels, kind.classes)
        if name == "vgg16":
            return _vgg16(kind)
        if name == "conv4":
            return _conv4(kind)
    raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")


def _small(name: str, kind: Kind) -> nn.Module:
    """He et al. 2016, section 4.2."""
    depth, widths = SMALL[name]
    model = ResNet(depth, widths)
    model.conv1 = nn.Conv2d(kind.channels, widths[0], 3, 1, 1, bias=False)
    model.linear = nn.Linear(widths[-1], kind.classes)
    return model


def _vgg16(kind: Kind) -> nn.Module:
    """Configuration D of Simonyan and Zisserman with batch normalisation, and one linear layer
    behind the convolutions."""
    # Five poolings by 2 need 32 x 32.
    layers: list[nn.Module] = [nn.ZeroPad2d(max(0, (32 - kind.size) // 2))]
    inputs = kind.channels
    for width, count in VGG16:
        for _ in range(count):
            convolution = nn.Conv2d(inputs, width, 3, 1, 1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, kind.classes))


def _conv4(kind: Kind) -> nn.Module:
    """Four convolutions with batch normalisation, each followed by a pooling by 2: 391k parameters
    that learn 20,000 images of CIFAR-10 by heart in 15 epochs."""
    layers: list[nn.Module] = []
    inputs = kind.channels
    for width in CONV4:
        layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
        inputs = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, kind.classes)
    )
