"""The pages are written for a code host too: links are the repository's, light and dark figures a `<picture>`."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

# Files outside docs/ that have a page on the site, which includes them.
PAGES = {
    "CHANGELOG.md": "docs/changelog.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "RELEASING.md": "docs/releasing.md",
    **{f"benchmarks/{file.name}": f"docs/records/{file.name}" for file in (ROOT / "benchmarks").glob("*.md")},
}
FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img src="([^"]+)" alt="([^"]+)">\s*</picture>')
IMAGES = ":::{{container}} figure\n![{2}]({1}){{.only-light}}\n![{2}]({0}){{.only-dark}}\n:::"


def translated(text: str, source: str, page: str) -> str:
    """The text of a file of the repository, as a part of a page of the site."""

    def link(match: re.Match[str]) -> str:
        target = normpath(f"{dirname(source) or '.'}/{match[2]}")
        return f"{match[1]}{relpath(PAGES.get(target, target), dirname(page))}{match[3]}"

    def prose(part: str) -> str:
        return LINK.sub(link, PICTURE.sub(lambda m: IMAGES.format(*m.groups()), part))

    parts = FENCE.split(text)
    return "".join(part if index % 2 else prose(part) for index, part in enumerate(parts))


def read_page(app: Sphinx, name: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if path.suffix == ".md":
        source = path.relative_to(ROOT).as_posix()
        content[0] = translated(content[0], source, source)
        if path.name == "report.md":
            # A run's report is reached from the page of results alone.
            content[0] = f"---\norphan: true\n---\n{content[0]}"


def read_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    source = (Path(app.srcdir) / path).resolve().relative_to(ROOT).as_posix()
    content[0] = translated(content[0], source, f"docs/{parent}.md")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
