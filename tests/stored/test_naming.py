"""Names in a file are matched with the model's whatever wrappers and libraries made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.naming import naming
from lab.cases import VIT

SMALL: dict[str, Any] = {**VIT, "num_labels": 3}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}
SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 16],
    "num_attention_heads": [1, 2],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
MODELS = {
    "ViT": SMALL,
    "DeiT": SMALL,
    "Beit": SMALL,
    "Dinov2": SMALL,
    "Swin": SWIN,
    "Segformer": SEGFORMER,
}


def built(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForImageClassification")(config)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_is_matched_to_the_last_tensor(
    name: str, fresh: bool, tmp_path: Path
) -> None:
    """Fails if a model that save_pretrained renames has a tensor without its counterpart, in a
    fresh model, whose biases are all zeros, or a trained one; or if exchanged layers match."""
    model = built(name)
    if not fresh:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    stored = checkpoint.digests(checkpoint.read(tmp_path))
    told = checkpoint.digests_of(model)
    matched = naming(stored, told)
    assert set(matched.model) == set(stored)
    assert set(matched.model.values()) == set(told)
    assert all(stored[file] == told[model] for file, model in matched.model.items())
    if fresh:
        return
    first, second = (
        next(n for n in sorted(stored, reverse=last) if "query.weight" in n or "q_proj.w" in n)
        for last in (False, True)
    )
    stored[first], stored[second] = stored[second], stored[first]
    exchanged = naming(stored, told)
    right = {n: m for n, m in exchanged.model.items() if stored[n] == told[m]}
    assert first not in right
    assert second not in right


TOLD = {f"blocks.{i}.fc.{kind}": f"{kind}{i}" for i in range(3) for kind in ("weight", "bias")}
CHANGES: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "module.": "module.{}".format,
    "compiled inside": lambda n: n.replace("fc", "fc._orig_mod"),
    "FSDP inside": lambda n: n.replace("fc", "_fsdp_wrapped_module.fc"),
    "nested": "net.encoder.{}".format,
    "prefix gone": lambda n: n.removeprefix("blocks."),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_name_is_known_whatever_the_content(name: str) -> None:
    """Fails if an altered tensor under a wrapper's name is told as two strange ones."""
    stored = {CHANGES[name](n): value for n, value in TOLD.items()}
    altered = next(iter(stored))
    stored[altered] = "other"
    matched = naming(stored, TOLD)
    assert matched.model == {CHANGES[name](n): n for n in TOLD}
    assert not matched.renamed


def test_renamings_are_one_pattern_for_another() -> None:
    """Fails if content alone decides: layers exchanged, two patterns for one, a tensor used
    twice."""
    honest = {n.replace("blocks", "layer").replace("fc", "dense"): v for n, v in TOLD.items()}
    assert set(naming(honest, TOLD).model.values()) == set(TOLD)
    assert len(naming(honest, TOLD).renamed) == 6
    exchanged = dict(honest)
    a, b = "layer.0.dense.weight", "layer.2.dense.weight"
    exchanged[a], exchanged[b] = exchanged[b], exchanged[a]
    assert not {a, b} & set(naming(exchanged, TOLD).model)
    mixed = {n.replace("0.dense", "0.linear"): v for n, v in honest.items()}
    assert not any("linear" in n for n in naming(mixed, TOLD).model)
    alike = {"x.0": "zeros", "x.1": "zeros"}
    assert len(naming({"y.0": "zeros"}, alike).model) == 1
    assert len(naming({"y.0": "zeros", "y.1": "zeros", "y.2": "zeros"}, alike).model) == 2


def test_two_names_that_wrappers_make_alike_stay_two() -> None:
    """Fails if a file with a name twice, in plain form, loses one of them."""
    stored = {"fc._orig_mod.weight": "a", "fc.weight": "b"}
    assert naming(stored, {"fc.weight": "b"}).model == {"fc.weight": "fc.weight"}
