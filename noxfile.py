"""Daily work by one command: `nox` runs lint, types and the fast tests; `nox --list` has the rest.

Sessions use the environment that nox is installed in (`pip install -e ".[dev]"`), so that nothing
is installed twice; `oldest` and `matrix` make environments of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "fast"]

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCH = {"2.7": ("torch==2.7.*", "torchvision==0.22.*"), "newest": ("torch", "torchvision")}


def run(session: nox.Session, tool: str, *words: str) -> None:
    """A tool of this environment, whatever comes first on the path."""
    session.run(str(Path(sys.executable).with_name(tool)), *words, external=True)


def pytest(session: nox.Session, *words: str, python: str = sys.executable) -> None:
    """Tests with the words behind `--`; 5 is no failure: none was selected."""
    command = (python, "-m", "pytest", "-q", *words, *session.posargs)
    session.run(*command, external=True, success_codes=[0, 5])


@nox.session
def lint(session: nox.Session) -> None:
    """Style, layout of the code, and which room imports from which."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package."""
    run(session, "mypy", "--strict")


@nox.session
def fast(session: nox.Session) -> None:
    """The tests that take minutes together; on two workers where all are run."""
    pytest(session)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take minutes each."""
    pytest(session, "-m", "slow")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in which no link is broken and no public name is missing."""
    run(session, "mkdocs", "build", "--quiet", "--strict", "--site-dir", "build/site")


@nox.session(venv_backend="venv", reuse_venv=True)
def oldest(session: nox.Session) -> None:
    """The fast tests on the oldest supported torch."""
    session.install(*TORCH["2.7"], "-e", ".[test]")
    pytest(session, python="python")


@nox.session(venv_backend="venv", python=PYTHONS)
@nox.parametrize("torch", list(TORCH))
def matrix(session: nox.Session, torch: str) -> None:
    """The fast tests on every supported Python with the oldest and the newest torch."""
    session.install(*TORCH[torch], "-e", ".[test]")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    pytest(session, python="python")
