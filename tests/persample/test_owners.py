"""Samples told apart in the backward, where the rows of a batch lie as its data says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from deepclean_hooks import fisher_diagonal
from deepclean_hooks.persample.owners import OWNED_SAMPLES, Owners, Unowned, weights
from lab.reference import difference_to_one_by_one

LENGTHS = [5, 5, 5, 3, 4, 2, 1]


class Rows(Dataset):
    """The samples of a batch that is a mapping."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


class Layers(nn.Module):
    """Three linear layers and a norm; what lies between is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.norm, self.scale = nn.LayerNorm(6), nn.Parameter(torch.randn(6))


class Masked(Layers):
    """Tokens without their padding, by a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.a(x)
        out = torch.zeros_like(x)
        out[mask] = self.norm(self.m(x[mask])) * self.scale
        return self.head(out.tanh().sum(1))


class Sliced(Layers):
    """Tokens without their padding, by lengths that became Python's numbers."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        packed = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
        packed = (self.norm(self.a(packed)) + self.scale).tanh()
        return self.head(torch.stack([t.sum(0) for t in packed.split(lengths)]))


class Sorted(Layers):
    """Samples in the order of their lengths, and back."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True)
        x = self.m(self.a(x[order]).tanh() * mask[order][..., None])
        return self.head(x.sum(1).index_select(0, order.argsort()).tanh())


class Experts(Layers):
    """Each token through one of two layers, by its values."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = (flat.sum(1) > 0).long()
        out = torch.zeros_like(flat)
        for k, expert in enumerate((self.a, self.m)):
            rows = (chosen == k).nonzero().squeeze(1)
            out.index_add_(0, rows, expert(flat[rows]) * self.scale)
        x = self.norm(out.view_as(x)) * mask[..., None]
        return self.head(x.tanh().sum(1))


class Convolved(nn.Module):
    """The frames of each clip that are there, as pictures: convolution and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4)
        self.table, self.head = nn.Embedding(3, 4), nn.Linear(4, 7)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (N, 5, 6)
        kept = x.unflatten(2, (2, 3))[mask]  # (frames, 2, 3)
        kept = self.norm(self.conv(kept)).tanh().mean(2)
        kept = kept + self.table(mask.nonzero()[:, 1].clamp(max=2))
        out = kept.new_zeros(len(x), 5, 4)
        out[mask] = kept
        return self.head(out.sum(1))


def ragged(lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    """Samples of five tokens, of which the first few are there."""
    generator = torch.Generator().manual_seed(2)
    n = len(lengths)
    return {
        "x": torch.randn(n, 5, 6, generator=generator, dtype=torch.float64),
        "mask": torch.stack([torch.arange(5) < length for length in lengths]),
        "labels": torch.arange(n) % 7,
    }


@pytest.mark.parametrize("batch_size", [3, 4, 7])
@pytest.mark.parametrize("model", [Masked, Sliced, Sorted, Experts, Convolved])
def test_rows_that_lie_as_the_data_says(model: type[nn.Module], batch_size: int) -> None:
    """Fails if the rows of a ragged batch are given to samples as those of the probe were: the
    first batch is full, so the self-check sees nothing."""
    torch.manual_seed(0)
    network, batch = model().double().eval(), ragged()
    measured = fisher_diagonal(network, Rows(batch), batch_size=batch_size, progress=False)
    assert difference_to_one_by_one(network, batch, measured.sums) <= 1e-9


@pytest.mark.parametrize("model", [Masked, Sliced, Sorted])
def test_ragged_rows_need_no_loop(model: type[nn.Module]) -> None:
    """Fails if telling rows apart in the backward gives up where each row has one owner."""
    torch.manual_seed(0)
    network = model().double().eval()
    measured = fisher_diagonal(network, Rows(ragged()), batch_size=3, progress=False)
    assert not measured.settings["one_sample_loop"]


def test_batch_of_more_samples_than_are_told_apart() -> None:
    """Fails if a batch is not taken in pieces whose powers of two the precision holds."""
    torch.manual_seed(0)
    lengths = [1 + i % 5 for i in range(OWNED_SAMPLES + 9)]
    batch = ragged(lengths)
    network = Masked().double().eval()
    measured = fisher_diagonal(network, Rows(batch), batch_size=len(lengths), progress=False)
    assert difference_to_one_by_one(network, batch, measured.sums) <= 1e-9
    single = fisher_diagonal(network.float(), Rows({**batch, "x": batch["x"].float()}))
    assert difference_to_one_by_one(network.double(), batch, single.sums) <= 1e-4


class TokenOfFrames(nn.Module):
    """A class token for each frame, of which a clip reads that of another row (Timesformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 7)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (N, 5, 6)
        frames = x.flatten(0, 1)[:, None]
        frames = torch.cat([self.token.expand(len(frames), -1, -1), frames], 1)
        return self.head((frames[: len(x), 0] + frames[:, 1].reshape(x.shape).mean(1)).tanh())


class HeadsOutermost(Layers):
    """Heads before samples, as in some attention layers: (heads N, T, D)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.a(x).view(*x.shape[:2], 3, 2).permute(2, 0, 1, 3).flatten(0, 1)
        bias = self.scale.view(3, 2).repeat_interleave(len(x), 0)[:, None]
        heads = (heads + bias).softmax(1)
        x = heads.view(3, *x.shape[:2], 2).permute(1, 2, 0, 3).flatten(2)
        return self.head(self.m(x).sum(1))


class BlockMasked(Layers):
    """All samples in one sequence, each seeing its own tokens: NaN times 0 is NaN everywhere."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = self.a(x).flatten(0, 1)
        of = torch.arange(len(x)).repeat_interleave(5)
        scores = (packed @ packed.t()).masked_fill(of[:, None] != of, float("-inf"))
        packed = self.m(scores.softmax(1) @ packed)
        return self.head(packed.view_as(x).sum(1))


class Transposed(nn.Module):
    """Indices turned before the embedding (XLNet), as many tokens as a multiple of 3 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        index = F.pad((x[..., 0].abs() * 4).long().clamp(max=8), (0, 1)).t()  # (6, N)
        return self.head(self.up(self.table(index)).tanh().mean(0))


@pytest.mark.parametrize("model", [TokenOfFrames, HeadsOutermost, BlockMasked, Transposed])
def test_no_mixing_where_a_sample_alone_is_as_in_its_batch(model: type[nn.Module]) -> None:
    """Fails if a model is refused for a NaN that spreads, though no sample depends on another."""
    torch.manual_seed(0)
    network, batch = model().double().eval(), ragged()
    measured = fisher_diagonal(network, Rows(batch), batch_size=4, progress=False)
    assert difference_to_one_by_one(network, batch, measured.sums) <= 1e-9
    assert not measured.settings["one_sample_loop"]


class Mixing(Layers):
    """Centres by the mean of the batch, also one that is hidden behind a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((x - x.mean(0)).tanh().sum(1))


@pytest.mark.parametrize("lengths", [LENGTHS, [5]])
def test_mixing_is_refused(lengths: list[int]) -> None:
    """Fails if a model that centres by the batch is measured, for a request of one sample too."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        fisher_diagonal(Mixing().double().eval(), Rows(ragged(lengths)), progress=False)


def settled(g: Tensor) -> Owners:
    """Owners of the rows of a gradient that is linear in the weights of four samples."""
    owners = Owners(4)
    owners.weigh(torch.einsum("n,nrd->rd", weights(4, g), g), 1)
    owners.settle(g.sum(0), 1)
    return owners


def test_a_row_of_two_samples_has_no_owner() -> None:
    """Fails if a row that two samples reach is given to one of them."""
    g = torch.zeros(4, 3, 2)
    g[0, 1], g[2, 0] = 1.5, torch.tensor([0.1, -7.0])
    rows = settled(g).rows(torch.tensor([[1.0], [2.0], [3.0]]), 4)
    assert rows[:, :, 0].tolist() == [[2.0], [0.0], [1.0], [0.0]]
    g[3, 1, 1] = 1e-3
    with pytest.raises(Unowned):
        settled(g)
