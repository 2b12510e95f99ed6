"""What the site needs beside the pages: the README as its first page, and the result files that
pages link to, which lie outside this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# (text](target) of Markdown, whose target lies in the repository but not in docs/.
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the README and every file outside docs/ that a page links to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # What the README calls docs/x.md is x.md here, and all else lies outside.
    inside = re.sub(r"\]\((?!https?:|docs/|#)([^)\s]+)\)", r"](../\1)", readme)
    pages = {"index.md": inside.replace("](docs/", "](")}
    files.append(File.generated(config, "index.md", content=pages["index.md"]))
    texts = [pages["index.md"]]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    linked = {target for text in texts for target, _ in OUTSIDE.findall(text)}
    for target in sorted(linked):
        path = ROOT / target
        if not path.exists():
            raise PluginError(f"a page links to {target}, which does not exist")
        if path.is_file():
            files.append(File.generated(config, f"repository/{target}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links that leave docs/ at the copies; a link to a folder leads to the first page."""

    def moved(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        return "](index.md)" if (ROOT / target).is_dir() else f"](repository/{target}{anchor})"

    return OUTSIDE.sub(moved, markdown)
