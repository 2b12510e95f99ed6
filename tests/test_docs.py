"""The pages name what there is: public names, files, and the paths that the architecture gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deepclean_hooks as deepclean

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_public_name_has_a_place_in_the_reference() -> None:
    """Fails if a public name has no entry in docs/api.md, or an entry names nothing."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    public = {name: getattr(deepclean, name) for name in deepclean.__all__ if name != "__version__"}
    assert sorted(entry.rpartition(".")[2] for entry in entries) == sorted(public)
    for entry in entries:
        module, _, name = entry.rpartition(".")
        # A type alias does not know where it is from.
        assert getattr(public[name], "__module__", None) in (module, "collections.abc", "typing")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """Fails if a page links to a file that has moved or never was."""
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not t.startswith("http")]
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_paths_of_the_architecture_exist() -> None:
    """Fails if a newcomer's question is answered by a path that is not there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:deepclean_hooks|integrations|tests|benchmarks|docs)/[\w./-]+)`", page)
    assert len(paths) >= 10
    assert not [path for path in paths if not (ROOT / path).exists()]
