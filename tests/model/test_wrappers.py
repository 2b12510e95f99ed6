"""Wrappers are taken off; what is no whole model of this process is refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from deepclean_hooks import DeepClean, Session, evaluate, fisher_diagonal


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(9, 12, generator=generator), torch.arange(9) % 3)


def exported() -> nn.Module:
    size = ({0: torch.export.Dim("n")},)
    return torch.export.export(network(), (torch.zeros(4, 12),), dynamic_shapes=size).module()


def inside() -> nn.Module:
    """An exported part of a model of the user's own."""
    return nn.Sequential(exported())


def offloaded() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(network(), execution_device=torch.device("cpu"))


def partly_offloaded() -> nn.Module:
    from accelerate import dispatch_model

    device_map = {"0": "cpu", "1": "cpu", "2": "disk"}
    model = network()
    weights = {f"2.{n}": p.detach() for n, p in model[2].named_parameters()}
    return dispatch_model(model, device_map, main_device="cpu", state_dict=weights, offload_dir=".")


def never_loaded() -> nn.Module:
    return network().to("meta")


def lazy() -> nn.Module:
    """A layer that takes its width from its first batch, before there was one."""
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 3))


def for_inference() -> nn.Module:
    """Made where no gradient is ever asked for."""
    with torch.inference_mode():
        return network()


BAD = {
    for_inference: r"4 parameters were made under torch\.inference_mode\(\), .*'0\.weight'",
    lazy: r"2 parameters have no shape yet, .*'0\.weight'.* call the model on a batch",
    exported: r"_StatefulGraphModule \(torch.export\) is a traced program",
    inside: "unlearn the module that it was exported from",
    offloaded: "4 parameters are on the meta device .* load it whole",
    partly_offloaded: r"2 parameters are on the meta device .*'2.weight'",
    never_loaded: "is offloaded .* or was never loaded",
}


@pytest.mark.parametrize("build", BAD)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_whole_model_is_refused(
    build: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if torch's own error comes out, from the middle of a measurement."""
    monkeypatch.chdir(tmp_path)
    model = build()
    with pytest.raises(ValueError, match=BAD[build]):
        fisher_diagonal(model, data(), progress=False)
    with pytest.raises(ValueError, match=BAD[build]):
        evaluate(model, forget=data(), retain=data(), progress=False)
    with pytest.raises(ValueError, match=BAD[build]):
        Session(model, DeepClean(), progress=False)


@pytest.mark.parametrize("model", [lambda x: x, "model.pt", network().state_dict()])
def test_what_is_no_module_is_refused(model: object) -> None:
    """Fails if an attribute that it lacks is all that is said."""
    with pytest.raises(TypeError, match=r"the model must be a torch.nn.Module, got \w+; put a"):
        Session(model, DeepClean(), progress=False)
    with pytest.raises(TypeError, match=r"the model must be a torch.nn.Module"):
        fisher_diagonal(model, data(), progress=False)


def test_a_scripted_model_is_measured() -> None:
    """Fails if TorchScript, whose operations are not seen, gives other numbers than the module."""
    model = network()
    plain = fisher_diagonal(model, data(), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch call it deprecated
        scripted = torch.jit.script(copy.deepcopy(model))
    found = fisher_diagonal(scripted, data(), progress=False)
    for name, total in plain.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-5, atol=1e-7)
