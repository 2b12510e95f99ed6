"""What a model is called with and which of its outputs are logits: clear, or refused with a loss_fn
that works as it stands in the message."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepclean_hooks import SSD, FisherDiagonal, Session, evaluate, fisher_diagonal
from deepclean_hooks.data import losses

ROWS = 12


def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(ROWS) % 3


class Net(nn.Module):
    """A classifier whose output is made by `output(features, logits)`."""

    def __init__(self, output: Callable[[Tensor, Tensor], object] = lambda e, z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 3)
        self.double()
        self.output = output

    def forward(self, images: Tensor) -> object:
        features = self.body(images.flatten(1)).relu()
        return self.output(features, self.head(features))


class ByName(Net):
    """The same, as transformers calls it."""

    def forward(self, pixel_values: Tensor, attention_mask: Tensor | None = None) -> object:
        return super().forward(pixel_values)


def mappings(**named: object) -> list[dict[str, object]]:
    """Samples as mappings; `image` and `label` in an entry stand for the pixels and the class."""
    x, y = pixels()
    held = {"image": x, "label": y, "label as float": y.double(), "index": torch.arange(ROWS)}
    return [
        {
            key: held[what][i] if isinstance(what, str) and what in held else what
            for key, what in named.items()
        }
        for i in range(ROWS)
    ]


def measured(model: nn.Module, data: object, **options: object) -> FisherDiagonal:
    return fisher_diagonal(model, data, batch_size=5, progress=False, **options)


def assert_plain(found: FisherDiagonal) -> None:
    expected = measured(Net(), TensorDataset(*pixels()))
    for name, total in expected.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-9, atol=1e-12)


CLEAR = {
    "image, label": (Net, {"image": "image", "label": "label"}),
    "img, fine_label": (Net, {"img": "image", "fine_label": "label"}),
    "pixel_values, label": (ByName, {"pixel_values": "image", "label": "label"}),
    "x, target": (Net, {"x": "image", "target": "label"}),
    "a path beside them": (Net, {"image": "image", "label": "label", "path": "a.png"}),
    "labels and no such name": (Net, {"image": "image", "labels": "label"}),
    "label first": (Net, {"label": "label", "image": "image"}),
    "label among integers": (
        ByName,
        {"pixel_values": "image", "attention_mask": "index", "label": "label"},
    ),
}


@pytest.mark.parametrize("name", CLEAR)
def test_keys_that_leave_no_doubt(name: str) -> None:
    """Fails if a batch with one tensor of class indices is refused, or its label is another one;
    measured and scored as `(x, y)` is."""
    kind, named = CLEAR[name]
    assert_plain(measured(kind(), mappings(**named)))
    data = mappings(**named)
    found = evaluate(kind(), forget=data, retain=data, batch_size=5, progress=False)
    plain = TensorDataset(*pixels())
    expected = evaluate(Net(), forget=plain, retain=plain, batch_size=5, progress=False)
    assert found.sets["forget"].loss == pytest.approx(expected.sets["forget"].loss)


def by_the_message(model: nn.Module, data: object, error: type[Exception], text: str) -> object:
    """What is measured with the loss_fn that the error names, taken from it as it stands."""
    with pytest.raises(error, match=text) as caught:
        measured(model, data)
    code = re.search(r"loss_fn=(lambda model, batch: .*?\)) \(F is", str(caught.value))
    assert code, str(caught.value)
    return measured(model, data, loss_fn=eval(code[1], {"F": F}))


DOUBTFUL = {
    "two integers": ({"image": "image", "group": "index", "kind": "label"}, "'labels'"),
    "two inputs": ({"image": "image", "mask": "image", "label": "label"}, "takes none of"),
    "an index": ({"image": "image", "label": "label", "index": "index"}, "takes none of"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_keys_in_doubt_are_refused_with_what_works(name: str) -> None:
    """Fails if something is guessed, or the message's loss_fn does not run on the batch at hand."""
    named, text = DOUBTFUL[name]
    if name == "two integers":
        named = {"image": "image", "kind": "label", "group": "index"}
    assert_plain(by_the_message(Net(), mappings(**named), TypeError, text))


def test_a_tuple_of_three_is_refused_with_what_works() -> None:
    """Fails if the message's loss_fn does not run: the index comes first."""
    x, y = pixels()
    data = TensorDataset(x, y, torch.rand(ROWS))
    assert_plain(by_the_message(Net(), data, TypeError, "got list of length 3"))


OUTPUTS = {
    "features, logits": lambda e, z: (e, z),
    "features, more features, logits": lambda e, z: [e, e[:, :4], z],
    "a mapping": lambda e, z: {"embedding": e, "out": z},
    "a mapping of logits under another name": lambda e, z: {"out": z},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_in_doubt_are_refused_with_what_works(name: str) -> None:
    """Fails if the first of two tensors is measured as logits, which here are features."""
    found = by_the_message(
        Net(OUTPUTS[name]), TensorDataset(*pixels()), TypeError, "could be the logits|no logits"
    )
    assert_plain(found)


@pytest.mark.parametrize(
    "output",
    [lambda e, z: (z,), lambda e, z: (z, [e, e]), lambda e, z: (e.mean(), z, e[:, :, None])],
)
def test_outputs_without_doubt(output: Callable[[Tensor, Tensor], object]) -> None:
    """Fails if a tuple with a single tensor of shape (N, C) is refused."""
    assert_plain(measured(Net(output), TensorDataset(*pixels())))


class Binary(nn.Module):
    """One logit a sample, with a dimension of its own or not."""

    def __init__(self, column: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.column = nn.Linear(16, 1).double(), column

    def forward(self, x: Tensor) -> Tensor:
        logit = self.head(x.flatten(1))
        return logit if self.column else logit.squeeze(1)


@pytest.mark.parametrize("column", [True, False])
def test_one_logit_is_no_classifier_of_one_class(column: bool) -> None:
    """Fails if a sigmoid head has a Fisher of zeros and an accuracy of 100 %; the message's loss
    gives the squares of a binary cross-entropy."""
    x, y = pixels()
    model, data = Binary(column), TensorDataset(x, y.clamp(max=1))
    found = by_the_message(model, data, ValueError, "one logit a sample")
    loss = F.binary_cross_entropy_with_logits(
        model.head(x.flatten(1)).squeeze(1), data.tensors[1].double(), reduction="none"
    )
    truth = sum(
        torch.autograd.grad(each, model.head.weight, retain_graph=True)[0] ** 2 for each in loss
    )
    torch.testing.assert_close(found.sums["head.weight"], truth)
    with pytest.raises(ValueError, match="one logit a sample"):
        evaluate(model, forget=data, retain=data, progress=False)
    run = Session(model, SSD(), loss_fn=lambda m, b: m(b[0]).reshape(-1).square(), progress=False)
    parts = (TensorDataset(x[:4], y[:4]), TensorDataset(x[4:], y[4:]))
    assert "not computed" in run.measure(*parts).report.scores["before"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_are_no_logits(dtype: torch.dtype) -> None:
    """Fails if the softmax of a softmax is measured; logarithms of probabilities are logits."""
    x, y = pixels()
    model = Net(lambda e, z: z.softmax(1)).to(dtype)
    found = by_the_message(model, TensorDataset(x.to(dtype), y), ValueError, "probabilities")
    logarithms = measured(
        Net(lambda e, z: z.log_softmax(1)).to(dtype), TensorDataset(x.to(dtype), y)
    )
    for name, total in logarithms.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-4, atol=1e-6)


def test_a_loss_without_a_graph_is_warned_of() -> None:
    """Fails if a loss that was detached gives a Fisher of zeros without a word."""
    with pytest.warns(UserWarning, match="every gradient of data is exactly 0"):
        measured(
            Net(),
            TensorDataset(*pixels()),
            loss_fn=lambda m, b: m(b[0]).detach().square().sum(1),
        )


def test_a_head_that_no_sample_reaches_is_warned_of() -> None:
    """Fails if a loss of the user's own that reads features leaves the head at 0 without a word."""
    model = Net(lambda e, z: (e, z))
    with pytest.warns(
        UserWarning, match=r"no gradient at|no sample of data has a gradient at head"
    ):
        measured(
            model,
            TensorDataset(*pixels()),
            loss_fn=lambda m, b: F.cross_entropy(m(b[0])[0], b[1], reduction="none"),
        )
    assert losses.cross_entropy(Net(), pixels()).shape == (ROWS,)
