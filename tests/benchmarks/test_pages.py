"""Every committed result file is on its page, and the page says what the file holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lab.results import RESULTS, ROOT
from benchmarks.pages.__main__ import TABLES, page_of, shown
from benchmarks.pages.markdown import placed

FILES = sorted(RESULTS.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_shows_what_the_file_holds(file: Path) -> None:
    """Fails if a table was edited by hand, a file was written anew without its page, is on none, or
    is not named beside its table."""
    page = page_of(file).read_text(encoding="utf-8")
    assert shown(page, file) == page
    assert file.name in page or file.stem in page


def test_every_table_has_its_file() -> None:
    """Fails if a result file was removed and its table stayed."""
    assert set(TABLES) <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_path_of_a_machine(file: Path) -> None:
    """Fails if a file says where its data lay."""
    text = file.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/root/", "/tmp/", str(ROOT)) if place in text]


def test_a_table_keeps_the_prose() -> None:
    """Fails if text outside the marks changes, a backslash is taken for a group, or a page without
    the marks passes."""
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb <!-- table: y -->\n<!-- end -->\n"
    new = placed(page, "x", "n\\1ew")
    assert new == page.replace("old", "n\\1ew")
    with pytest.raises(ValueError, match="0 places for the table 'z'"):
        placed(page, "z", "new")
