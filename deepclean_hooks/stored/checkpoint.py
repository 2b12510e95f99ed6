"""What a checkpoint file holds, tensor by tensor, and its digests."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deepclean_hooks.model.wrappers import unwrap
from deepclean_hooks.stored import bits

# The weights in a folder that transformers or PEFT wrote: the first of these that is there.
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin")


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each tensor of a state_dict, over dtype, shape and bits, by name."""
    return {name: bits.tensor_digest(value) for name, value in sorted(tensors(state).items())}


def digests_of(model: nn.Module) -> dict[str, str]:
    """The digests of what a checkpoint stores of a model; `bits.combined` of them is the model's.

    Of a sharded model the tensors are gathered one after the other; all ranks call this.
    """
    return digests(unwrap(model).state_dict())


def model_digest(model: nn.Module) -> str:
    """SHA-256 of what a checkpoint stores of a model, every bit, wrappers taken off."""
    return bits.combined(digests_of(model))


def tied(model: nn.Module) -> dict[str, str]:
    """Each further name in the state_dict of a tensor that has an earlier name, and that name."""
    first: dict[int, str] = {}
    names = {}
    for name, value in unwrap(model).state_dict(keep_vars=True).items():
        if first.setdefault(id(value), name) != name:
            names[name] = first[id(value)]
    return names


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a state_dict that are tensors."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and isinstance(name, str)
    }


class Unknown:
    """An object of a class that was not loaded: what it was made of, and nothing that runs."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        # An object made without __init__, as copyreg does, has no parts yet.
        self.parts = (*getattr(self, "parts", ()), state)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The state_dict, if this is a module that was stored as a whole; else empty."""
        inside = next((part for part in reversed(self.parts) if isinstance(part, Mapping)), {})
        if not {"_parameters", "_buffers", "_modules"} <= inside.keys():
            return {}
        passing = inside.get("_non_persistent_buffers_set", ())
        buffers = {n: value for n, value in inside["_buffers"].items() if n not in passing}
        state = {
            f"{prefix}{n}": v for n, v in tensors({**inside["_parameters"], **buffers}).items()
        }
        for name, module in inside["_modules"].items():
            if isinstance(module, Unknown):
                state |= module.state_dict(f"{prefix}{name}.")
        return state


def read(path: str | os.PathLike[str]) -> Any:
    """What a .safetensors file, a file of torch.save, or a folder of transformers or PEFT holds.

    No code of the file runs: an object that is neither a tensor nor plain data, such as the
    argparse.Namespace of torchvision's and timm's scripts, comes back as `Unknown`. Raises
    ValueError for another file.
    """
    where = Path(path)
    if where.is_dir():
        return _of_folder(where)
    if not where.is_file():
        raise ValueError(f"{where} is no file")
    try:
        if where.suffix == ".safetensors":
            return load_file(where)
        # torch warns of formats and layouts, which a reader need not know.
        with warnings.catch_warnings(), torch.serialization.safe_globals(_inert(where)):
            warnings.simplefilter("ignore")
            return torch.load(where, map_location="cpu", weights_only=True)
    except Exception as reason:  # neither library has an error of its own for a damaged file
        words = " ".join(str(reason).split()) or type(reason).__name__
        raise ValueError(f"{where} cannot be read as a checkpoint: {words[:200]}") from reason


def _of_folder(folder: Path) -> dict[str, Any]:
    for pattern in _WEIGHTS:
        if parts := sorted(folder.glob(pattern)):
            return {name: value for part in parts for name, value in read(part).items()}
    raise ValueError(f"{folder} holds no weights: looked for {', '.join(_WEIGHTS)}")


def _inert(path: Path) -> list[Any]:
    """A class that does nothing in the place of each that torch would refuse to load."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the older format, which is not a zip file; torch.load says what it refuses
        return []
    split = [name.rpartition(".") for name in names]
    return [type(name, (Unknown,), {"__module__": module}) for module, _, name in split]


def walk(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Every container and tensor in what a file holds, each once, with its place: `model.fc`.

    What stands in an optimizer's state, and elsewhere too, has its place elsewhere.
    """
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", loaded)])
    later: deque[tuple[str, Any]] = deque()
    while waiting or later:
        place, value = (waiting or later).popleft()
        if isinstance(value, Tensor):
            yield place, value
            continue
        if id(value) in seen:
            continue  # a file may hold a list that holds itself
        seen.add(id(value))
        value = (isinstance(value, Unknown) and value.state_dict()) or value
        if isinstance(value, Mapping):
            yield place, value
            inside = list(value.items())
        elif isinstance(value, list | tuple):
            inside = list(enumerate(value))
        elif isinstance(value, Unknown):
            inside = list(enumerate(getattr(value, "parts", ())))
        else:
            continue
        for key, part in inside:
            within = f"{place}.{key}" if place else str(key)
            (later if _of_optimizer(within) else waiting).append((within, part))


def _of_optimizer(place: str) -> bool:
    return "optim" in place.lower()


def states(loaded: Any) -> dict[str, dict[str, Tensor]]:
    """Whatever in a file maps names to tensors, by its place in the file; "" is the file itself.

    Not what lies in an optimizer's state, which a model does not load.
    """
    return {
        place: tensors(value)
        for place, value in walk(loaded)
        if isinstance(value, Mapping) and tensors(value) and not _of_optimizer(place)
    }
