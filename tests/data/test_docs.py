"""Every Python snippet of docs/data.md runs as it stands, given a model and data."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepclean_hooks as deepclean

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


class Pictures(torch.utils.data.Dataset):
    """Images with a random transform."""

    def __init__(self) -> None:
        self.transform = lambda image: image + torch.rand(1)
        self.targets = [i % 4 for i in range(48)]

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(index))
        return self.transform(image), self.targets[index]


@pytest.mark.parametrize("snippet", SNIPPETS)
@pytest.mark.filterwarnings("ignore:.*(dead|forget|candidate entry).*:UserWarning")
def test_snippet_runs(snippet: str) -> None:
    """Fails if a snippet of the page is not what the package does."""
    torch.manual_seed(0)
    x, y = torch.randn(48, 1, 6, 6), torch.arange(48) % 4
    names: dict[str, object] = {
        "deepclean": deepclean,
        "torch": torch,
        "F": F,
        "model": nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)),
        "train_set": torch.utils.data.TensorDataset(x, y),
        "augmented_set": Pictures(),
        "evaluation_transform": lambda image: image,
    }
    exec(snippet, names)
    assert len(SNIPPETS) == 2
