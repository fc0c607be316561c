"""The tutorials are run when the site is built: what a block prints stands below it, an error ends the build."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def executed(text: str, page: str) -> str:
    """The page with the output of each of its Python blocks, which share one namespace and run in order."""
    namespace: dict[str, Any] = {"__name__": page}

    def run(match: re.Match[str]) -> str:
        printed, aside = StringIO(), StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(aside):
                exec(compile(match[1], page, "exec"), namespace)
        except Exception as error:
            raise ExtensionError(f"{page}: this block failed with {error!r}:\n{match[1]}\n{aside.getvalue()}") from error
        output = printed.getvalue().rstrip()
        return f"{match[0]}\n\n:::{{code-block}} text\n:class: output\n{output}\n:::\n" if output else match[0]

    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return BLOCK.sub(run, text)
        finally:
            os.chdir(before)


def read_page(app: Sphinx, name: str, content: list[str]) -> None:
    if name.startswith("tutorials/"):
        content[0] = executed(content[0], name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", read_page)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
