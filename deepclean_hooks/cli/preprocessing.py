"""From a picture to a model's input, as the model's library keeps it, or as it is said here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """What differs from the preprocessing that the model's library keeps."""

    size: Annotated[int | None, "pixels a side of the model's input", 1] = None
    resize: Annotated[
        int | None, "pixels of the shorter side before the centre is cut out (default: --size)", 1
    ] = None
    mean: Annotated[list[float], "of each channel, of 0 to 1"] = field(default_factory=list)
    std: Annotated[list[float], "of each channel, of 0 to 1"] = field(default_factory=list)
    interpolation: Annotated[str | None, "bilinear, bicubic or nearest"] = None


def of_timm(model: Any, options: PreprocessingOptions) -> tuple[Transform, str]:
    """timm's evaluation transform by the model's pretrained_cfg, and what it does in words."""
    from timm import data

    timm: Any = data  # published without types
    kept = timm.resolve_data_config({}, model=model)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    settings = {name: kept[name] for name in names}
    if options.size is not None:
        settings["input_size"] = (3, options.size, options.size)
        settings["crop_pct"] = 1.0
    if options.resize is not None:
        settings["crop_pct"] = settings["input_size"][-1] / options.resize
    settings |= _given(options, "mean", "std", "interpolation")
    made: Transform = timm.create_transform(**settings, is_training=False)
    return made, _words("timm", settings)


def of_torchvision(weights: Any, options: PreprocessingOptions) -> tuple[Transform, str]:
    """The transform of a torchvision weights entry, and what it does in words."""
    settings: dict[str, Any] = _given(options, "mean", "std")
    if options.size is not None:
        settings |= {"crop_size": options.size, "resize_size": options.resize or options.size}
    elif options.resize is not None:
        settings["resize_size"] = options.resize
    if options.interpolation is not None:
        settings["interpolation"] = _interpolation(options.interpolation)
    made = weights.transforms(**settings)
    return made, f"torchvision: {' '.join(repr(made).split())}"


def of_processor(processor: Any, options: PreprocessingOptions) -> tuple[Transform, str]:
    """A transformers image processor as a transform, and what it does in words."""
    settings: dict[str, Any] = {}
    if options.size is not None:
        settings = {"size": {"height": options.size, "width": options.size}}
        settings["do_center_crop"] = False
    if options.resize is not None:
        raise ValueError("--resize: an image processor of transformers has none; give --size alone")
    settings |= {f"image_{k}": v for k, v in _given(options, "mean", "std").items()}
    if options.interpolation is not None:
        settings["resample"] = {"nearest": 0, "bilinear": 2, "bicubic": 3}[
            _interpolation(options.interpolation).value
        ]

    def transform(picture: Any) -> Tensor:
        values: Tensor = processor(picture, return_tensors="pt", **settings)["pixel_values"][0]
        return values

    kept = {**processor.to_dict(), **settings}
    names = ("size", "do_center_crop", "crop_size", "image_mean", "image_std", "resample")
    return transform, _words("transformers", {n: kept[n] for n in names if kept.get(n) is not None})


def as_said(options: PreprocessingOptions) -> tuple[Transform, str]:
    """A transform made of the options alone; raises ValueError for what they leave open."""
    from torchvision import transforms

    missing = [name for name in ("size", "mean", "std") if not getattr(options, name)]
    if missing:
        raise ValueError(
            "the model keeps no preprocessing; give "
            f"{', '.join(f'--{name}' for name in missing)}, as it was trained"
        )
    how = _interpolation(options.interpolation or "bilinear")
    assert options.size is not None
    made: Transform = transforms.Compose(
        [
            transforms.Resize(options.resize or options.size, how),
            transforms.CenterCrop(options.size),
            transforms.ToTensor(),
            transforms.Normalize(options.mean, options.std),
        ]
    )
    return made, _words("as given", vars(options))


def _given(options: PreprocessingOptions, *names: str) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in names if getattr(options, name)}
    for name in ("mean", "std"):
        if len(found.get(name, [0, 0, 0])) != 3:
            raise ValueError(f"--{name} needs 3 numbers, one a channel, got {found[name]}")
    return found


def _interpolation(name: str) -> Any:
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode][:3]
    if name not in known:
        raise ValueError(f"--interpolation is one of {', '.join(known)}, got {name!r}")
    return InterpolationMode(name)


def _words(library: str, settings: dict[str, Any]) -> str:
    return f"{library}: " + ", ".join(f"{name} {value}" for name, value in settings.items())
