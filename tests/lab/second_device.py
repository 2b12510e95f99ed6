"""A second kind of device, "second", for tests on machines without a GPU.

Its memory is the host's and its kernels are the CPU's, but it takes no CPU tensor among its own, as
a GPU takes none, and every rule goes its accelerator's way. `start()` compiles it (20 seconds) and
changes torch for the rest of the process.
"""

import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "second"


def start() -> None:
    """Makes `torch.device("second")`; needs a C++ compiler and ninja."""
    from torch.utils.cpp_extension import load

    # pip puts ninja beside the interpreter, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    source = Path(__file__).with_suffix(".cpp")
    # Not torch's own folder, where a killed build leaves a lock that the next one waits for.
    with tempfile.TemporaryDirectory() as folder:
        extension: Any = load(
            "second_device", [str(source)], extra_cflags=["-O0"], build_directory=folder
        )
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 1  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    half = [torch.float16, torch.bfloat16]
    module.get_amp_supported_dtype = lambda: half  # type: ignore[attr-defined]
    torch._register_device_module(NAME, module)
    extension.start()
    Tensor.__deepcopy__ = _deepcopy  # type: ignore[method-assign]


_original = Tensor.__deepcopy__


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Any:
    """torch copies the storage, which it can do for devices it knows."""
    if id(self) in memo or self.device.type != NAME:
        return _original(self, memo)
    memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]
