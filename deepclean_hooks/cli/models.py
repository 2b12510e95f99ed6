"""A model by its library's name, with its weights from a file; and back into the form in which it
came."""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepclean_hooks.cli import preprocessing
from deepclean_hooks.cli.preprocessing import PreprocessingOptions, Transform
from deepclean_hooks.model import no_trace
from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.files import written_whole
from deepclean_hooks.stored.naming import by_name

_HEADS = {"timm": "num_classes", "torchvision": "num_classes"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where its weights are."""

    model: Annotated[
        str, "timm:NAME, torchvision:NAME, hf:FOLDER (transformers) or module:function of your own"
    ]
    weights: Annotated[
        Path | None, "its weights: .safetensors, or a file of torch.save; hf: folders have them"
    ] = None
    state: Annotated[str | None, "which state_dict of the file, where several fit: its key"] = None
    model_args: Annotated[str, "further arguments of the model, as JSON"] = "{}"
    device: Annotated[str | None, "cpu, cuda, ... (default: a GPU where there is one)"] = None


@dataclass
class Loaded:
    """A model, the transform of its inputs, and how it is written."""

    model: nn.Module
    transform: Transform
    preprocessing: str
    weights: Path | None = None
    place: str = ""  # of the state_dict in the file
    names: dict[str, str] = field(default_factory=dict)  # in the file -> in the model
    processor: Any = None

    def like(self, weights: Path) -> nn.Module:
        """Another model of the same kind, with the weights of a file; raises ValueError as `load`
        does."""
        other = replace(self, model=copy.deepcopy(self.model))
        _read_weights(other, weights, None, "the model", None)
        return other.model

    def save(self, folder: Path) -> Path:
        """Writes the weights into the folder, whole or not at all, in the form in which they came:
        the same kind of file, the same names and nesting, nothing else that the file held. Returns
        where they are."""
        state = {n: t.detach().cpu().contiguous() for n, t in self.model.state_dict().items()}
        if self.processor is not None:
            return self._save_folder(folder / "model")
        if self.weights is None:
            names: Mapping[str, str] = {name: name for name in state}
            path = folder / "model.safetensors"
        else:
            names, path = self.names, folder / self.weights.name
        written = {file: state[name] for file, name in names.items()}
        with written_whole(path) as temporary:
            if path.suffix == ".safetensors":
                # Some libraries store a tensor under two names; this format takes each once.
                save_file({n: t.clone() for n, t in written.items()}, temporary, self._metadata())
            else:
                nested: Any = written
                for key in reversed(self.place.split(".") if self.place else []):
                    nested = {key: nested}
                with open(temporary, "wb") as file:  # by a path, its name would be written inside
                    torch.save(nested, file)
        return path

    def _metadata(self) -> dict[str, str]:
        if self.weights is None:
            return {"format": "pt"}
        with safe_open(self.weights, "pt") as file:
            return dict(file.metadata() or {"format": "pt"})

    def _save_folder(self, folder: Path) -> Path:
        temporary = folder.with_name(f".{folder.name}.deepclean-partial")
        shutil.rmtree(temporary, ignore_errors=True)
        model: Any = self.model
        model.save_pretrained(temporary)
        self.processor.save_pretrained(temporary)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        return folder


def load(options: ModelOptions, kept: PreprocessingOptions, classes: int) -> Loaded:
    """The model with its weights in eval mode, its head of so many classes.

    Raises ValueError for a library, model, file or state_dict that does not serve, and says what is
    there; for a head of another number of classes than the data have.
    """
    library, _, name = options.model.partition(":")
    try:
        arguments = json.loads(options.model_args)
    except ValueError as reason:
        raise ValueError(f"--model-args {options.model_args}: {reason}; write JSON") from reason
    if not isinstance(arguments, dict):
        raise ValueError(f"--model-args {options.model_args}: write a JSON object, name: value")
    if not name:
        raise ValueError(
            f"--model {options.model}: write timm:NAME, torchvision:NAME, hf:FOLDER or "
            "module:function"
        )
    if library in _HEADS:
        arguments.setdefault(_HEADS[library], classes)
    loaded = _LIBRARIES.get(library, _own)(options.model, arguments, kept)
    if options.weights is not None:
        _read_weights(loaded, options.weights, options.state, options.model, classes)
    elif library in _HEADS:
        raise ValueError(
            f"--weights is missing: {options.model} has none of its own; name the file"
        )
    loaded.model.eval()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        try:
            loaded.model.to(device)
        except Exception as reason:  # torch has several, by what is missing
            words = " ".join(str(reason).split())[:100]
            raise ValueError(f"--device {device} cannot be used: {words}; try cpu") from reason
    return loaded


def require_head(loaded: Loaded, sample: Tensor, highest: int, classes: int | None) -> None:
    """Raises ValueError unless the model answers to a sample (C, H, W) with a logit for each class;
    `highest`: the highest class index of the data."""
    device = no_trace.device_of(loaded.model)
    with torch.no_grad():
        try:
            output = loaded.model(sample[None].to(device))
        except Exception as reason:  # a shape that does not fit has no error of its own
            raise ValueError(
                f"the model cannot read a picture of shape {tuple(sample.shape)}: "
                f"{str(reason).splitlines()[0][:150]}; give its --size"
            ) from reason
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("the model does not return logits (N, C); wrap it in a module:function")
    if (classes is not None and logits.shape[1] != classes) or logits.shape[1] <= highest:
        raise ValueError(_of_head(logits.shape[1], classes or highest + 1))


def _of_head(head: int, classes: int) -> str:
    return (
        f"the model's head has {head} classes and the data have {classes}; give the data that it "
        "was trained on, or name the classes of the head in --class-names"
    )


def _timm(name: str, arguments: dict[str, Any], kept: PreprocessingOptions) -> Loaded:
    timm = _library("timm", "vision")
    short = name.partition(":")[2]
    if not short.startswith(("hf", "local-dir:")) and not timm.is_model(short.partition(".")[0]):
        close = difflib.get_close_matches(short, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {short!r}; close are {', '.join(close) or 'none'}")
    model = _made(timm.create_model, name, short, arguments)
    return Loaded(model, *preprocessing.of_timm(model, kept))


def _torchvision(name: str, arguments: dict[str, Any], kept: PreprocessingOptions) -> Loaded:
    torchvision = _library("torchvision", "vision")
    short = name.partition(":")[2]
    if short not in torchvision.models.list_models(torchvision.models):
        close = difflib.get_close_matches(short, torchvision.models.list_models(), n=3)
        raise ValueError(
            f"torchvision has no model {short!r}; close are {', '.join(close) or 'none'}"
        )
    model = _made(torchvision.models.get_model, name, short, arguments)
    weights = torchvision.models.get_model_weights(short).DEFAULT
    return Loaded(model, *preprocessing.of_torchvision(weights, kept))


def _hugging_face(name: str, arguments: dict[str, Any], kept: PreprocessingOptions) -> Loaded:
    _library("transformers", "trainer")
    from deepclean_hooks.integrations import pretrained

    model, processor = _made(pretrained.load, name, name.partition(":")[2], arguments)
    transform, words = preprocessing.of_processor(processor, kept)
    return Loaded(model, transform, words, processor=processor)


def _own(name: str, arguments: dict[str, Any], kept: PreprocessingOptions) -> Loaded:
    place, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    try:
        make = getattr(importlib.import_module(place), function)
    except (ImportError, AttributeError) as reason:
        raise ValueError(
            f"--model {name}: {reason}; write timm:NAME, torchvision:NAME, hf:FOLDER, or a "
            "function of a module in this folder or on PYTHONPATH"
        ) from reason
    model = _made(make, name, None, arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} returned {type(model).__name__}; it must return a module")
    if hasattr(model, "pretrained_cfg"):
        return Loaded(model, *preprocessing.of_timm(model, kept))
    return Loaded(model, *preprocessing.as_said(kept))


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        words = f"this model needs {name}: pip install 'deepclean-hooks[{extra}]'"
        raise ValueError(words) from missing


def _made(make: Any, name: str, first: str | None, arguments: dict[str, Any]) -> Any:
    try:
        return make(*([] if first is None else [first]), **arguments)
    except Exception as reason:  # of the user's function, or of a library that dislikes arguments
        words = " ".join(str(reason).split())[:200]
        raise ValueError(
            f"--model {name} with {arguments} cannot be made: {type(reason).__name__}: {words}; "
            "correct --model or --model-args"
        ) from reason


def _read_weights(
    loaded: Loaded, path: Path, key: str | None, name: str, classes: int | None
) -> None:
    held = checkpoint.read(path)
    states = {p: s for p, s in checkpoint.states(held).items() if _is_plain(held, p)}
    shown = ", ".join(repr(place) for place in list(states)[:8]) or "none"
    if key is not None and key not in states:
        raise ValueError(f"{path} has no state_dict {key!r}; there are {shown}")
    if key is not None:
        states = {key: states[key]}
    own = loaded.model.state_dict()
    fits = {place: by_name(list(state), list(own)) for place, state in states.items()}
    whole = [place for place, names in fits.items() if len(names) == len(own)]
    if not whole:
        best = max(fits, key=lambda place: len(fits[place]), default=None)
        missing = [n for n in own if best is None or n not in fits[best].values()]
        keys = ", ".join(list(states[best])[:3]) if best is not None else "none"
        raise ValueError(
            f"{path} does not hold the weights of {name}: {len(missing)} of {len(own)} "
            f"tensors are missing, such as {missing[0]}; state_dicts there: {shown}; keys: {keys}; "
            "name the model that they are of"
        )
    if len(whole) > 1:
        raise ValueError(
            f"{path} holds several state_dicts that fit: {', '.join(map(repr, whole))}; say which "
            "with --state"
        )
    loaded.weights, loaded.place, loaded.names = path, whole[0], fits[whole[0]]
    state = {model: states[whole[0]][file] for file, model in loaded.names.items()}
    _require_shapes(path, own, state, classes)
    loaded.model.load_state_dict(state)


def _is_plain(held: Any, place: str) -> bool:
    """Whether dicts alone lead to the state_dict: a module that was stored whole is written back by
    nothing that runs no code of the file."""
    for key in place.split(".") if place else []:
        held = held.get(key) if isinstance(held, Mapping) else None
    return isinstance(held, Mapping)


def _require_shapes(
    path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor], classes: int | None
) -> None:
    wrong = [name for name in own if own[name].shape != state[name].shape]
    if not wrong:
        return
    ours, theirs = (tuple(s[wrong[-1]].shape) for s in (own, state))
    if classes is not None and ours[:1] == (classes,) and len(wrong) <= 4:
        raise ValueError(f"{path}: {_of_head(theirs[0], classes)}")
    raise ValueError(
        f"{path}: {len(wrong)} tensors have another shape than the model's, such as {wrong[-1]} "
        f"{theirs}, the model's is {ours}; name the model that they are of, or its --model-args"
    )
