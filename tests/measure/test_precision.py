"""TF32 is off while measuring, by whichever interface it was switched on, and on again after."""

import pytest
import torch
from torch import nn

from deepclean_hooks.model import no_trace
from lab.processes import in_child

NEW = hasattr(torch.backends.cudnn, "conv")  # the interface of torch 2.9


def test_tf32_is_off_inside_and_back_after() -> None:
    """Fails if products are rounded to TF32 while measuring, or the user's choice is lost."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    was = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for on in ((True, True), (True, False), (False, True)):
            matmul.allow_tf32, cudnn.allow_tf32 = on
            with pytest.raises(KeyError), no_trace.no_trace(nn.Linear(2, 2)):
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
                raise KeyError
            assert (matmul.allow_tf32, cudnn.allow_tf32) == on
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = was


PRECISION = """
import torch
from torch import nn
from deepclean_hooks.model import no_trace
parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
for part in parts:
    part.fp32_precision = "tf32"
with no_trace.no_trace(nn.Linear(2, 2)):
    assert [part.fp32_precision for part in parts] == ["ieee", "ieee"]
assert [part.fp32_precision for part in parts] == ["tf32", "tf32"]
"""


@pytest.mark.slow
@pytest.mark.skipif(not NEW, reason="torch before 2.9 has no fp32_precision")
def test_tf32_switched_on_by_the_newer_interface() -> None:
    """Fails if the newer interface's choice is not seen; it bars reading the flags above for the
    rest of a process, so it has one of its own."""
    ran = in_child("-c", PRECISION)
    assert not ran.returncode, ran.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_would_be_seen_on_a_gpu() -> None:
    """Fails if a product inside is as coarse as one with TF32 outside is."""
    torch.manual_seed(0)
    model = nn.Linear(512, 512, bias=False).cuda()
    x = torch.randn(256, 512, device="cuda")
    truth = x.double() @ model.weight.double().t()

    def error() -> float:
        return float((model(x).double() - truth).abs().max() / truth.abs().max())

    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        coarse = error()
        with no_trace.no_trace(model):
            fine = error()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was
    assert coarse > 1e-4
    assert fine < 1e-5
