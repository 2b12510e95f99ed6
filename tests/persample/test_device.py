"""The model on another kind of device than the data: what only a GPU could show otherwise."""

import importlib.util
import shutil

import pytest

from lab.processes import ROOT, TESTS, in_child

TOOLS = {
    "a C++ compiler": shutil.which("c++") is not None,
    "ninja": importlib.util.find_spec("ninja") is not None,
}


@pytest.mark.slow
@pytest.mark.skipif(not all(TOOLS.values()), reason=f"needs {', '.join(TOOLS)}: {TOOLS}")
def test_on_a_second_device() -> None:
    """Fails if any of second_device_checks.py does; in a process of its own, because a device
    cannot be taken out of torch again."""
    checks = TESTS / "lab" / "second_device_checks.py"
    ran = in_child("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(checks), folder=ROOT)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
