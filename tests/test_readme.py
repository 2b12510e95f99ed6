"""Every Python snippet of the README and of the page on loops runs as it stands, given a model and
loaders."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from deepclean_hooks.__main__ import main
from lab import pictures

README = Path(__file__).resolve().parent.parent / "README.md"
PAGES = (README, README.parent / "docs" / "loops.md")
SNIPPETS = [
    snippet
    for page in PAGES
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


def surroundings() -> dict[str, object]:
    """What a reader of the README has: a trained classifier, its data, and perhaps a gold model."""

    def network() -> nn.Module:
        layers: list[tuple[str, nn.Module]] = []
        for i, module in enumerate((nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())):
            layers.append((f"conv{i}" if i == 0 else f"{i}", module))
        layers += [("flat", nn.Flatten()), ("head", nn.Linear(96, 4))]
        model = nn.Sequential()
        for name, module in layers:
            model.add_module(name, module)
        return model

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 1, 6, 6), torch.arange(60) % 4)
    parts = {"forget": range(8), "retain": range(8, 40), "train": range(40)}
    parts |= {"test": range(40, 50), "held_out": range(50, 60)}
    loaders = {f"{n}_loader": DataLoader(Subset(data, p), batch_size=8) for n, p in parts.items()}
    sets = {f"{n}_set": Subset(data, p) for n, p in parts.items()}
    return {"torch": torch, "F": F, "model": network(), "gold_model": network(), **loaders, **sets}


def lightning_module(model: nn.Module) -> nn.Module:
    """The model as a LightningModule; Lightning is imported for its own snippet only."""
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Module()


# A snippet's `...` is a loop that does not step.
@pytest.mark.filterwarnings("ignore:no optimizer step of this model was seen:UserWarning")
# A Trainer asks for pinned memory, with or without a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a name, an argument or a promise of the README does not exist."""
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    exec("import deepclean_hooks as deepclean", names)
    with warnings.catch_warnings():
        if "lightning_module" in SNIPPETS[index]:
            warnings.simplefilter("ignore")  # it warns of few steps, few workers and loggers
            names["lightning_module"] = lightning_module(names["model"])
        exec(compile(SNIPPETS[index], f"snippet {index}", "exec"), names)
    assert re.search("deepclean|Trainer|torch.save", SNIPPETS[index])


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the command does not run as it stands, on a small network of another name."""
    (snippet,) = re.findall(
        r"```bash\n(deepclean-hooks .*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    pictures.write(tmp_path / "photos")
    pictures.write(tmp_path / "photos-test", each=2, seed=1)
    pictures.write(tmp_path / "photos-unseen", each=2, seed=2)
    torch.save(pictures.weights(), "resnet18.pth")
    (tmp_path / "delete.txt").write_text("ant/03.png\n", encoding="utf-8")
    words = shlex.split(snippet.replace("timm:resnet18", pictures.MODEL).replace("\\\n", " "))
    assert main(words[1:]) == 0
    assert (tmp_path / "unlearned" / "report.html").is_file()


def test_snippets_were_found() -> None:
    """Fails if the README's fences change so that nothing is run."""
    assert len(SNIPPETS) >= 12
