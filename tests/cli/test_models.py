"""Models of three libraries and of the user's own come back in the form in which they came."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from deepclean_hooks.cli.models import Loaded, ModelOptions, load
from deepclean_hooks.cli.preprocessing import PreprocessingOptions
from lab import pictures

SAID = PreprocessingOptions(size=32, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.2])
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8), "RGB"
)


def own(width: int = 4) -> nn.Module:
    """A model of the user's own."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 900, 3))


def loaded(kept: PreprocessingOptions = SAID, **options: Any) -> Loaded:
    return load(ModelOptions(device="cpu", **options), kept, 3)


def altered(found: Loaded) -> dict[str, torch.Tensor]:
    """Moves every weight; the state that a file should then hold."""
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(1)
    return dict(found.model.state_dict())


Pack = Callable[[dict[str, torch.Tensor]], Any]
FORMS: dict[str, tuple[Pack, Callable[[Any], Any]]] = {
    "flat": (lambda s: s, lambda f: f),
    "model": (lambda s: {"model": s, "args": {"lr": 1}}, lambda f: f["model"]),
    "state_dict, module.": (
        lambda s: {"state_dict": {f"module.{n}": v for n, v in s.items()}, "epoch": 3},
        lambda f: {n.removeprefix("module."): v for n, v in f["state_dict"].items()},
    ),
    "compiled, deeper": (
        lambda s: {"run": {"net": {f"_orig_mod.{n}": v for n, v in s.items()}}},
        lambda f: {n.removeprefix("_orig_mod."): v for n, v in f["run"]["net"].items()},
    ),
}


@pytest.mark.parametrize(("pack", "unpack"), FORMS.values(), ids=FORMS)
def test_file_of_torch_keeps_its_form(tmp_path: Path, pack: Pack, unpack: Pack) -> None:
    """Fails if names or nesting change, or what belongs to the original comes along."""
    torch.save(pack(pictures.weights()), tmp_path / "net.pth")
    found = loaded(model=pictures.MODEL, weights=tmp_path / "net.pth")
    assert all(v.equal(found.model.state_dict()[n]) for n, v in pictures.weights().items())
    state = altered(found)
    (tmp_path / "out").mkdir()
    written = torch.load(found.save(tmp_path / "out"), weights_only=True)
    assert len(written) in (1, len(state))
    assert unpack(written).keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in unpack(written).items())


def test_safetensors_keep_names_and_metadata(tmp_path: Path) -> None:
    """Fails if the file's own words are lost, which libraries ask for."""
    path = tmp_path / "net.safetensors"
    save_file(pictures.weights(), path, {"format": "pt", "of": "bees"})
    found = loaded(model=pictures.MODEL, weights=path)
    state = altered(found)
    (tmp_path / "out").mkdir()
    written = found.save(tmp_path / "out")
    assert written == tmp_path / "out" / "net.safetensors"
    assert all(value.equal(state[name]) for name, value in load_file(written).items())
    with safe_open(written, "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "bees"}


def test_chosen_state_of_several(tmp_path: Path) -> None:
    """Fails if --state is not followed."""
    states = {"model": pictures.weights(), "ema": pictures.weights(1)}
    torch.save(states, tmp_path / "net.pth")
    found = loaded(model=pictures.MODEL, weights=tmp_path / "net.pth", state="ema")
    assert all(v.equal(states["ema"][n]) for n, v in found.model.state_dict().items())


def test_timm_transform_is_timms(tmp_path: Path) -> None:
    """Fails if what the model's configuration says is not what pictures go through."""
    import timm
    from timm.data import create_transform, resolve_data_config

    torch.save(pictures.weights(), tmp_path / "net.pth")
    options = {"model": pictures.MODEL, "weights": tmp_path / "net.pth"}
    model = timm.create_model("test_resnet", num_classes=3)
    plain = create_transform(**resolve_data_config({}, model=model))
    assert loaded(PreprocessingOptions(), **options).transform(PICTURE).equal(plain(PICTURE))
    found = loaded(PreprocessingOptions(size=32, resize=36), **options)
    assert found.transform(PICTURE).shape == (3, 32, 32)
    assert "input_size (3, 32, 32)" in found.preprocessing


def test_torchvision_transform_and_head(tmp_path: Path) -> None:
    """Fails if the head is not made for the data's classes, or the transform is another."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    options = {"model": "torchvision:squeezenet1_1", "weights": tmp_path / "net.pth"}
    found = loaded(PreprocessingOptions(), **options)
    plain = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    assert found.transform(PICTURE).equal(plain(PICTURE))
    small = loaded(PreprocessingOptions(size=64, mean=[0.5] * 3), **options).transform(PICTURE)
    expected = type(plain)(crop_size=64, resize_size=64, mean=(0.5, 0.5, 0.5))
    assert small.equal(expected(PICTURE))
    assert model.eval()(small[None]).equal(found.model(small[None]))


@pytest.mark.slow
def test_transformers_folder(tmp_path: Path) -> None:
    """Fails if transformers cannot load what was written, its processor included."""
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    from lab.cases import VIT

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=3, **VIT)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    found = loaded(PreprocessingOptions(), model=f"hf:{tmp_path / 'vit'}")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    expected = processor(PICTURE, return_tensors="pt")["pixel_values"][0]
    assert found.transform(PICTURE).equal(expected)
    state = altered(found)
    (tmp_path / "out").mkdir()
    written = AutoModelForImageClassification.from_pretrained(found.save(tmp_path / "out"))
    assert all(value.equal(state[name]) for name, value in written.state_dict().items())
    again = AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    assert again.to_dict() == processor.to_dict()


def test_function_of_the_users_own(tmp_path: Path) -> None:
    """Fails if a module's function, its arguments or the given preprocessing are not followed."""
    torch.save(own(6).state_dict(), tmp_path / "net.pth")
    found = loaded(
        model="cli.test_models:own",
        model_args=json.dumps({"width": 6}),
        weights=tmp_path / "net.pth",
    )
    inputs = found.transform(PICTURE)
    assert found.model(inputs[None]).shape == (1, 3)
    whole = Image.fromarray(np.full((40, 40, 3), 51, np.uint8))  # 0.2 of 1
    expected = torch.tensor([-1.0, -1.5, -2.0])[:, None, None].expand(3, 32, 32)
    assert torch.allclose(found.transform(whole), expected, atol=1e-6)
    with pytest.raises(ValueError, match="keeps no preprocessing; give --size, --mean, --std"):
        loaded(PreprocessingOptions(), model="cli.test_models:own")
