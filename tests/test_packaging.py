"""What is shipped, what an import costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "deepclean_hooks"
OPTIONAL = (
    "transformers",
    "accelerate",
    "lightning",
    "torchvision",
    "timm",
    "sklearn",
    "matplotlib",
)


def python(code: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the source distribution, made from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("build")
    # A copy, because setuptools leaves build/ behind and puts what lies there into the next wheel.
    unwanted = ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    copytree(ROOT, folder / "source", symlinks=True, ignore=unwanted)
    command = ["build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source")]
    made = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return next((folder / "dist").glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Fails if adapters become a top-level package or get lost, or tests and examples are
    shipped."""
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        f"{PACKAGE}/{path.relative_to(ROOT / PACKAGE).as_posix()}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        if "integrations" not in path.parts
    }
    expected |= {f"{PACKAGE}/integrations/{p.name}" for p in (ROOT / "integrations").glob("*.py")}
    expected |= {f"{PACKAGE}/py.typed"}
    templates = (ROOT / PACKAGE / "report" / "templates").iterdir()
    expected |= {f"{PACKAGE}/report/templates/{path.name}" for path in templates}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_imports_on_its_own(wheel: Path, tmp_path: Path) -> None:
    """Fails if the wheel needs the checkout, for the adapters in particular."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        f"import {PACKAGE}, {PACKAGE}.integrations as adapters\n"
        f"print({PACKAGE}.__file__); print(adapters.__file__)\n"
        f"page = {PACKAGE}.Report(method='x', settings={{}}, phase='new').to_html()\n"
        "assert 'Unlearning report: x' in page"
    )
    ran = python(code, "-I", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert all(Path(line).is_relative_to(site) for line in ran.stdout.split())


def test_metadata_names_version_licence_and_extras(wheel: Path) -> None:
    """Fails if an extra that the documentation names is gone, or the version drifts from the
    code's."""
    archive = zipfile.ZipFile(wheel)
    path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(path).decode().splitlines()
    version = python(f"import {PACKAGE}; print({PACKAGE}.__version__)", cwd=ROOT).stdout.strip()
    assert f"Version: {version}" in lines
    assert "License-Expression: Apache-2.0" in lines
    extras = {line.split()[-1] for line in lines if line.startswith("Provides-Extra:")}
    assert extras == {
        "all",
        "cli",
        "dev",
        "docs",
        "evaluate",
        "lightning",
        "test",
        "trainer",
        "vision",
    }


def test_import_loads_no_optional_library() -> None:
    """Fails if an adapter, a plot or an attack imports its library at the import of the package."""
    code = f"import sys, {PACKAGE}; print(*sorted(m for m in {OPTIONAL} if m in sys.modules))"
    ran = python(code, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_adapters_refuse_to_be_a_top_level_package() -> None:
    """Fails if `import integrations` in a checkout makes a second copy of every adapter."""
    ran = python("import integrations", cwd=ROOT)
    assert ran.returncode != 0
    assert "ImportError" in ran.stderr
    assert "import its names from deepclean_hooks" in ran.stderr


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its name within it; the package itself is ""."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        if parts[0] != "integrations":  # a link, which some versions of rglob follow
            yield ".".join(part for part in parts if part != "__init__"), path
    for path in sorted((ROOT / "integrations").glob("*.py")):
        name = "integrations" if path.stem == "__init__" else f"integrations.{path.stem}"
        yield name, path


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, at its top and inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("name", "path"), [pytest.param(name, path, id=name or PACKAGE) for name, path in sources()]
)
def test_only_named_modules_import_what_is_theirs(name: str, path: Path) -> None:
    """Fails if collectives leave the room of the ranks, or a training library the adapters."""
    for dotted in imports(path):
        top = dotted.split(".")[0]
        if top in ("transformers", "accelerate", "lightning"):
            assert name.startswith("integrations."), dotted
        if dotted.startswith("torch.distributed") and name != "ranks.collectives":
            raise AssertionError(f"{name} imports {dotted}; only ranks speaks torch.distributed")


def test_old_module_names_lead_to_the_new() -> None:
    """Fails if a module that moved cannot be imported by its old name, or not by all its names."""
    code = (
        f"import warnings; warnings.simplefilter('ignore'); from {PACKAGE} import _moved\n"
        "from importlib import import_module\n"
        f"import {PACKAGE}\n"
        "for old, new in _moved.MOVED.items():\n"
        f"    there, here = import_module('{PACKAGE}.' + old), import_module('{PACKAGE}.' + new)\n"
        "    names = {n: v for n, v in vars(here).items() if n[0] != '_'}\n"
        "    assert all(getattr(there, n) is v for n, v in names.items()), old\n"
        f"from {PACKAGE}.samples import samples_of\n"
        f"from {PACKAGE} import identifiers\n"
    )
    ran = python(code, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
