"""The table of models that everything is tried on: real architectures at small size, and hand-made
oddities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model to build and the size of its input; `tokens` for integer input of that length."""

    build: Callable[[], nn.Module]
    size: int = 32
    shape: tuple[int, ...] | None = None
    tokens: int = 0

    def model(self) -> nn.Module:
        """The seeded model in eval mode, its normalisation and raw parameters away from their
        initial 0 and 1."""
        torch.manual_seed(0)
        model = self.build()
        unsettle(model)
        return model.eval()

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """n seeded samples, float32 or int64, and their labels."""
        generator = torch.Generator().manual_seed(3)
        y = torch.randint(0, CLASSES, (n,), generator=generator)
        if self.tokens:
            return torch.randint(0, 20, (n, self.tokens), generator=generator), y
        shape = self.shape or (3, self.size, self.size)
        return torch.randn(n, *shape, generator=generator), y


def unsettle(model: nn.Module) -> None:
    """Moves running statistics, one-dimensional and special parameters off their initial values."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    special = ("pos_embed", "cls_token", "class_token", "bias_table", "gamma", "mask_token")
    for name, p in model.named_parameters():
        if p.dim() <= 1 or any(s in name for s in special):
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.05)


# ---------------------------------------------------------------------- hand-made oddities


class Tied(nn.Module):
    """Tied weights, a module called three times, a raw parameter used twice, PReLU, a scalar
    scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.repeated = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.PReLU(8)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(8, CLASSES)
        self.raw, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        for _ in range(3):
            x = x + self.norm(self.repeated(x)).relu()
        x = x.mean((2, 3)) @ self.raw
        x = F.linear(F.linear(x, self.up.weight, self.up.bias).relu(), self.up.weight.t())
        return self.head((x @ self.raw) * self.scale)


class Unruled(nn.Module):
    """An operation without a rule: its parameter goes to the one-sample loop, the others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.head = nn.Parameter(torch.randn(8, 12)), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(x, self.raw).tanh())


class Einsums(nn.Module):
    """Products by einsum: explicit and implicit output, samples first and last, two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(6, 5))
        self.three, self.head = nn.Parameter(torch.randn(3, 5)), nn.Linear(15, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (N, 4, 6)
        x = torch.einsum("bij,ik,jl->bkl", x, self.one, self.two)
        x = torch.einsum("klb,kl->bkl", x.permute(1, 2, 0), self.three).tanh()
        x = x + torch.einsum("zkl, kl", x, self.three)[:, None, None]
        return self.head(x.flatten(1))


class Parametrized(nn.Module):
    """weight_norm on a convolution and a linear layer, an orthogonal matrix, GroupNorm, RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        p = nn.utils.parametrizations
        self.conv = p.weight_norm(nn.Conv2d(3, 8, 3, stride=2))
        self.up = p.weight_norm(nn.Linear(8, 16))
        self.mix, self.head = p.orthogonal(nn.Linear(16, 16)), nn.Linear(16, CLASSES)
        self.group, self.rms = nn.GroupNorm(2, 8), nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.conv(x)).relu().mean((2, 3))
        return self.head(self.rms(self.mix(self.up(x)).relu()))


class Pooled(nn.Module):
    """`body`, then a mean over everything but samples and channels, then a linear head; with extras
    on the way."""

    def __init__(self, *body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(2))


class Unused(nn.Module):
    """A parameter that the forward never reads, a frozen one, and an activation modified in
    place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.head = (
            nn.Linear(12, 8),
            nn.Linear(8, 8),
            nn.Linear(8, CLASSES),
        )
        self.unused = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.relu_()
        x = self.frozen(x)
        x += 1
        return self.head(x.tanh_())


class Tokens(nn.Module):
    """Embedded indices with a padding row, learned positions, a class token, attention in
    sequence-first order."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(length + 1, 16))
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.norm = nn.MultiheadAttention(16, 4), nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        x = torch.cat([self.token.repeat(len(x), 1, 1), x], 1) + self.positions
        x = x.transpose(0, 1)  # (T, N, D)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x[0])


class Interleaved(nn.Module):
    """Copies of a parameter for each sample by several routes, a matrix on the left, addmm, a scale
    per token."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(4, 6))
        self.mix = nn.Parameter(torch.randn(5, 4))
        self.heat = nn.Parameter(torch.randn(5, 1))
        self.shift = nn.Parameter(torch.randn(2, 1, 6))
        self.weight, self.bias = (
            nn.Parameter(torch.randn(6, CLASSES)),
            nn.Parameter(torch.randn(CLASSES)),
        )

    def forward(self, x: Tensor) -> Tensor:  # (N, 4, 6)
        n = len(x)
        x = x + self.query.unsqueeze(0).repeat_interleave(n, 0) + self.query.expand(n, 4, 6)
        x = torch.matmul(self.mix, x.tanh()) * self.heat  # (N, 5, 6)
        x = self.shift.repeat(n, 1, 1).view(n, 2, 6).sum(1, keepdim=True) - x
        return torch.addmm(self.bias, x.mean(1), self.weight)


class Opaque(torch.autograd.Function):
    """x w, as an operation that no interception sees inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


class Custom(nn.Module):
    """A custom autograd function between ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 8), nn.Linear(8, CLASSES)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Opaque.apply(self.first(x).tanh(), self.weight))


class Recurrent(nn.Module):
    """An LSTM over the rows of a picture: one fused operation with all its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def convolutions() -> nn.Module:
    """Grouped, dilated, depthwise, 'same', strided 1 x 1 and transposed two-dimensional
    convolutions, all norms."""
    return Pooled(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, groups=4, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(inplace=True),
        nn.Conv2d(16, 16, 5, groups=16, padding=2, stride=2),
        nn.InstanceNorm2d(16, affine=True),
        nn.Conv2d(16, 8, 3, dilation=2, padding=2, bias=False),
        nn.Conv2d(8, 12, 1, stride=2),
        nn.ConvTranspose2d(12, 8, 3, stride=2, output_padding=1, padding=1),
        nn.ConvTranspose2d(8, 8, 2, groups=2),
        nn.Hardswish(inplace=True),
        channels=8,
    )


def one_dimension() -> nn.Module:
    """One-dimensional convolutions, plain, grouped and transposed."""
    return Pooled(
        nn.Conv1d(4, 8, 5, padding=2),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Conv1d(8, 8, 3, groups=8),
        nn.ConvTranspose1d(8, 6, 4, stride=2),
        channels=6,
    )


def three_dimensions() -> nn.Module:
    """Three-dimensional convolutions, plain, grouped and transposed."""
    return Pooled(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.Conv3d(6, 6, 3, groups=3),
        nn.ConvTranspose3d(6, 4, 2),
        channels=4,
    )


# ---------------------------------------------------------------------- real architectures


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=CLASSES, **options)

    return build


def _torchvision_vit() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 1), CNBlockConfig(48, None, 2)]
    return ConvNeXt(blocks, num_classes=CLASSES)


def _torchvision_swin(version: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as s

        options: dict[str, Any] = {}
        if version == 2:
            options = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2}
        return s.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4], num_classes=CLASSES, **options)

    return build


def _torchvision_parts(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(*args, num_classes=CLASSES, **options)

    return build


# Every kind and width of block, each once: what repeats tells nothing new, and the truth of these
# four took a third of the suite.


def _vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    widths: list[str | int] = [64, "M", 128, "M", 256, "M", 512, "M"]
    model = VGG(make_layers(widths, batch_norm=True), init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)
    return model


def _densenet() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    return DenseNet(block_config=(2, 2, 2, 2), num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    # (expansion, kernel, stride, inputs, outputs, layers): the first four stages of b0.
    stages = (
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 1),
        (6, 5, 2, 24, 40, 1),
        (6, 3, 2, 40, 80, 1),
    )
    return EfficientNet([MBConvConfig(*stage, 1.0, 1.0) for stage in stages], 0.2, 0.2, CLASSES)


def _resnext() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=4, width_per_group=16)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return build


def _timm_mixer(gated: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.layers import GatedMlp
        from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock

        options: dict[str, Any] = {}
        if gated:
            options = {"block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 6}
        return MlpMixer(
            num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=32, **options
        )

    return build


def _timm_standardized() -> nn.Module:
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2(
        layers=(1, 1),
        channels=(128, 128),
        num_classes=CLASSES,
        norm_layer=GroupNormAct,
        conv_layer=StdConv2d,
        stem_chs=32,
    )


def _timm_volo() -> nn.Module:
    from timm.models.volo import VOLO

    return VOLO(
        layers=(1, 1, 1, 1),
        img_size=64,
        num_classes=CLASSES,
        embed_dims=(32, 64, 64, 64),
        num_heads=(2, 4, 4, 4),
        use_aux_head=False,
    )


def _transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_DINO = {k: v for k, v in VIT.items() if k != "intermediate_size"}

ODDITIES = {
    "tied, repeated, raw": Case(Tied, 12),
    "no rule (cdist)": Case(Unruled, shape=(12,)),
    "einsum": Case(Einsums, shape=(4, 6)),
    "weight norm, orthogonal": Case(Parametrized, 12),
    "convolutions": Case(convolutions, 14),
    "1-d convolutions": Case(one_dimension, shape=(4, 20)),
    "3-d convolutions": Case(three_dimensions, shape=(2, 6, 6, 6)),
    "unused, frozen, in place": Case(Unused, shape=(12,)),
    "embedding, sequence first": Case(lambda: Tokens(7), tokens=7),
    "copied per sample": Case(Interleaved, shape=(4, 6)),
    "custom function": Case(Custom, shape=(12,)),
    "lstm": Case(Recurrent, shape=(5, 6)),
}

ARCHITECTURES = {
    "torchvision resnet18": Case(_torchvision("resnet18")),
    "torchvision resnext": Case(_resnext),
    "torchvision vgg11_bn": Case(_vgg),
    "torchvision mobilenet_v3_small": Case(_torchvision("mobilenet_v3_small")),
    "torchvision densenet121": Case(_densenet),
    "torchvision efficientnet_b0": Case(_efficientnet),
    "torchvision convnext (3 stages)": Case(_torchvision_convnext),
    "torchvision regnet_y_400mf": Case(_torchvision("regnet_y_400mf")),
    "torchvision shufflenet_v2_x0_5": Case(_torchvision("shufflenet_v2_x0_5")),
    "torchvision squeezenet1_1": Case(_torchvision("squeezenet1_1"), 48),
    "torchvision vit (nn.MultiheadAttention)": Case(_torchvision_vit),
    "torchvision swin": Case(_torchvision_swin(1)),
    "torchvision swin v2": Case(_torchvision_swin(2)),
    "torchvision maxvit": Case(
        _torchvision_parts("MaxVit", (64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0), 64
    ),
    "timm vit_tiny": Case(_timm("vit_tiny_patch16_224", img_size=32, depth=2)),
    "timm vit, map pooling": Case(
        _timm("vit_tiny_patch16_224", img_size=32, depth=1, global_pool="map", class_token=False)
    ),
    "timm vit, layer scale, registers": Case(
        _timm("vit_small_patch14_reg4_dinov2", img_size=28, depth=1), 28
    ),
    "timm convnext_atto": Case(_timm("convnext_atto"), 64),
    "timm resnetv2, weight standardisation": Case(_timm_standardized),
    "timm nf_regnet_b0, norm-free": Case(_timm("nf_regnet_b0")),
    "timm beit, relative positions": Case(
        _timm("beit_base_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4)
    ),
    "timm cait": Case(_timm("cait_xxs24_224", img_size=32, depth=1)),
    "timm eva02": Case(_timm("eva02_tiny_patch14_224", img_size=28, depth=1), 28),
    "timm mixer": Case(_timm_mixer(False)),
    "timm gmlp": Case(_timm_mixer(True)),
    "timm xcit": Case(_timm("xcit_nano_12_p16_224", img_size=32, depth=1)),
    "timm mobilevit_xxs": Case(_timm("mobilevit_xxs"), 64),
    "timm coatnet": Case(_timm("coatnet_pico_rw_224", img_size=64, depths=(1, 1, 1, 1)), 64),
    "timm poolformer_s12": Case(_timm("poolformer_s12")),
    "timm swinv2": Case(
        _timm("swinv2_tiny_window8_256", img_size=32, window_size=4, depths=(1, 1)), 32
    ),
    "timm efficientnet_lite0": Case(_timm("tf_efficientnet_lite0")),
    "timm levit": Case(_timm("levit_128s", img_size=64), 64),
    "timm volo": Case(_timm_volo, 64),
    "transformers vit": Case(_transformers("ViT", **VIT)),
    "transformers deit": Case(_transformers("DeiT", **VIT)),
    "transformers beit": Case(
        _transformers("Beit", use_relative_position_bias=True, layer_scale_init_value=0.1, **VIT)
    ),
    "transformers swin": Case(
        _transformers(
            "Swin", image_size=32, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4
        )
    ),
    "transformers convnext": Case(
        _transformers("ConvNext", depths=[1, 1, 1], hidden_sizes=[8, 16, 24], num_stages=3)
    ),
    "transformers resnet": Case(
        _transformers("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "transformers dinov2": Case(_transformers("Dinov2", **_DINO)),
}

CASES = {**ODDITIES, **ARCHITECTURES}
