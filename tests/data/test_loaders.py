"""Loaders around a DataLoader: taken off, understood, or walked as they are; never ignored."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from deepclean_hooks import FisherDiagonal, fisher_diagonal
from deepclean_hooks.data.samples import samples_of

COUNT = 22


class Pixels(Dataset):
    """Images of 0 to 255, as PIL gives them to timm's transforms."""

    transform: object = None

    def __getitem__(self, index: int) -> tuple[object, int]:
        from PIL import Image

        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(pixels.numpy())
        return (image if self.transform is None else self.transform(image)), index % 3

    def __len__(self) -> int:
        return COUNT


def timm_loader(**how: object) -> object:
    from timm.data import create_loader

    device = torch.device("cpu")
    return create_loader(Pixels(), (3, 8, 8), 5, device=device, num_workers=0, **how)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def by_hand(batches: list[tuple[Tensor, Tensor]]) -> FisherDiagonal:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    return fisher_diagonal(network(), TensorDataset(x.float(), y), progress=False)


def assert_same(one: FisherDiagonal, other: FisherDiagonal, rtol: float = 1e-6) -> None:
    assert one.count == other.count
    for name, total in other.sums.items():
        torch.testing.assert_close(one.sums[name], total, rtol=rtol, atol=rtol * float(total.max()))


def test_timm_prefetcher_normalises() -> None:
    """Fails if pixels of 0 to 255 are measured, or another mean than the loader's is taken off:
    compared with the batches that it yields."""
    loader = timm_loader(mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3))
    found = fisher_diagonal(network(), loader, progress=False)
    assert_same(found, by_hand(list(loader)))
    assert found.settings["fingerprints"] == "each sample before it is collated"


def test_timm_prefetcher_in_half_precision() -> None:
    """Fails if a float32 model is fed the half-precision pixels that autocast was meant for."""
    loader = timm_loader(img_dtype=torch.float16)
    mean, std = loader.mean.float(), loader.std.float()  # rounded to half precision by timm
    expected = by_hand([((x.float() - mean) / std, y) for x, y in loader.loader])
    assert_same(fisher_diagonal(network(), loader, progress=False), expected)


def test_timm_training_loader_is_measured_whole_and_unmixed() -> None:
    """Fails if mixup's mixed samples are measured, or drop_last or repeated augmentation leaves
    samples out or counts them more than once; random crops are warned of."""
    from timm.data import FastCollateMixup

    loader = timm_loader(
        is_training=True,
        collate_fn=FastCollateMixup(mixup_alpha=1.0, num_classes=3),
        re_prob=0.5,
        hflip=0.5,
        use_multi_epochs_loader=True,
    )
    with pytest.warns(UserWarning, match="the samples of data change from pass to pass"):
        assert fisher_diagonal(network(), loader, progress=False).count == COUNT


def floats() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(COUNT, 3, 8, 8, generator=generator), torch.arange(COUNT) % 3)


class Around:
    """A wrapper of the user's own, under any of the usual names."""

    def __init__(self, loader: object, change: Callable[[Tensor], Tensor], name: str) -> None:
        setattr(self, name, loader)
        self.name, self.change = name, change

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in getattr(self, self.name):
            yield self.change(x), y

    def __len__(self) -> int:
        return len(getattr(self, self.name))


def plain(**how: object) -> DataLoader:
    return DataLoader(floats(), 5, shuffle=True, **how)


@pytest.mark.parametrize("name", ["loader", "dataloader", "_dataloader", "base_dataloader"])
def test_a_wrapper_that_only_moves_batches_is_taken_off(name: str) -> None:
    """Fails if such a wrapper is refused, or its drop_last costs samples."""
    before = torch.get_rng_state()
    wrapped = Around(plain(drop_last=True), lambda x: x.clone(), name)
    assert samples_of(wrapped).indices == tuple(range(COUNT))
    assert_same(
        fisher_diagonal(network(), wrapped, progress=False),
        fisher_diagonal(network(), floats(), progress=False),
    )
    assert torch.equal(before, torch.get_rng_state())


def test_a_wrapper_that_changes_batches_is_walked() -> None:
    """Fails if what it does to the batches is left out, or what it leaves out is not noticed."""
    doubled = Around(plain(), lambda x: 2 * x, "loader")
    assert_same(fisher_diagonal(network(), doubled, progress=False), by_hand(list(doubled)))
    with pytest.raises(ValueError, match="20 distinct samples of 22: it leaves samples out"):
        fisher_diagonal(
            network(), Around(plain(drop_last=True), lambda x: 2 * x, "loader"), progress=False
        )


class Scaled(DataLoader):
    """A subclass that makes its batches its own way."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((3 * x, y) for x, y in super().__iter__())


class Announced(DataLoader):
    """A subclass that adds nothing to the batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super().__iter__()


def test_a_subclass_is_what_it_yields() -> None:
    """Fails if the batches of a subclass are not those that are measured, or a harmless subclass
    loses the whole set behind its drop_last."""
    loader = Scaled(floats(), 5)
    assert_same(fisher_diagonal(network(), loader, progress=False), by_hand(list(loader)))
    assert samples_of(Announced(floats(), 5, shuffle=True, drop_last=True)).indices is not None


def test_loaders_of_fabric_and_accelerate() -> None:
    """Fails if the loaders that these hand back after their set-up are refused."""
    from accelerate import Accelerator
    from lightning.fabric import Fabric

    expected = fisher_diagonal(network(), floats(), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, of the number of workers
        prepared = Accelerator(cpu=True).prepare(plain(drop_last=True))
        set_up = Fabric(accelerator="cpu", devices=1).setup_dataloaders(plain(drop_last=True))
    for loader in (prepared, set_up):
        assert_same(fisher_diagonal(network(), loader, progress=False), expected)


class Lists(nn.Module):
    """Images of different sizes, as a list, and a class weight that travels with the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        pooled = [self.convolution(i[None]).relu().mean((0, 2, 3)) for i in images]
        return self.head(torch.stack(pooled))


def images(count: int = 12) -> list[tuple[Tensor, int]]:
    torch.manual_seed(2)
    sizes = [(3, 5 + i % 3, 7) for i in range(count)]
    return [(torch.randn(*size).double(), i % 3) for i, size in enumerate(sizes)]


def listed(rows: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
    return [image for image, _ in rows], torch.tensor([label for _, label in rows])


def named(rows: list[tuple[Tensor, int]]) -> dict[str, object]:
    return {"images": [image for image, _ in rows], "labels": listed(rows)[1]}


def squares(model: nn.Module, rows: list[tuple[Tensor, int]], weights: Tensor) -> dict[str, Tensor]:
    """One sample at a time, by hand."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in rows:
        loss = nn.functional.cross_entropy(model([image]), torch.tensor([label])) * weights[label]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient**2
    return sums


@pytest.mark.parametrize("size", [2, 3, 4, 12])
@pytest.mark.parametrize("collate", [listed, named])
def test_a_list_of_images_is_a_batch(size: int, collate: object) -> None:
    """Fails if the rows of one image are taken for samples: with three channels and batches of
    three the two numbers are the same."""
    model = Lists().double()
    found = fisher_diagonal(model, DataLoader(images(), size, collate_fn=collate), progress=False)
    assert found.count == 12
    for name, total in squares(model, images(), torch.ones(3)).items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_class_weights_travel_with_the_batch(size: int) -> None:
    """Fails if weights of three classes are cut like samples where a batch, or a part of it that is
    probed, has three of them."""
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def weighted(rows: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
        return (*listed(rows), weights)

    def loss(model: nn.Module, batch: tuple[list[Tensor], Tensor, Tensor]) -> Tensor:
        x, y, w = batch
        return nn.functional.cross_entropy(model(x), y, reduction="none") * w[y]

    model = Lists().double()
    found = fisher_diagonal(
        model,
        DataLoader(images(), size, collate_fn=weighted),
        loss_fn=loss,
        progress=False,
    )
    assert found.count == 12
    for name, total in squares(model, images(), weights).items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-9, atol=1e-12)


class Streamed(IterableDataset):
    """The images, without indices."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(images())


def test_class_weights_travel_with_the_batches_of_a_stream() -> None:
    """Fails if the layout of a batch is known only where samples have indices."""
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def weighted(rows: list[tuple[Tensor, int]]) -> dict[str, object]:
        return {**named(rows), "weights": weights}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = nn.functional.cross_entropy(
            model(batch["images"]), batch["labels"], reduction="none"
        )
        return losses * batch["weights"][batch["labels"]]

    model = Lists().double()
    loader = DataLoader(Streamed(), 4, collate_fn=weighted)
    found = fisher_diagonal(model, loader, loss_fn=loss, progress=False)
    for name, total in squares(model, images(), weights).items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-9, atol=1e-12)


def test_a_loader_in_a_loader_is_refused_with_what_works() -> None:
    """Fails if wrapping a loader once more, which cannot work, ends in an error from inside."""
    loader = timm_loader()
    for wrapped in (DataLoader(loader), DataLoader(loader, batch_size=None)):
        with pytest.raises(TypeError, match=r"around a PrefetchLoader, .*pass the PrefetchLoader"):
            fisher_diagonal(network(), wrapped, progress=False)


def test_batches_drawn_by_the_data_set_itself() -> None:
    """Fails if what a batch sampler drops goes unnoticed where the data set makes the batches."""
    from torch.utils.data import BatchSampler, RandomSampler

    def drawing(drop_last: bool) -> DataLoader:
        sampler = BatchSampler(RandomSampler(floats()), 5, drop_last)
        return DataLoader(floats(), batch_size=None, sampler=sampler)

    expected = fisher_diagonal(network(), floats(), progress=False)
    assert_same(fisher_diagonal(network(), drawing(False), progress=False), expected)
    with pytest.raises(ValueError, match="20 distinct samples of 22: it leaves samples out"):
        fisher_diagonal(network(), drawing(True), progress=False)
