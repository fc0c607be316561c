"""The tutorials are run when the site is built: what a block prints stands below it, an error ends the build.

Blocks in `python` and `sh` are run, in order; those in other languages (`py`, `console`) are only shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A line that a terminal overwrites, and what colours it.
CONTROL = re.compile(r"[^\n]*\r(?=[^\n])|\x1b\[[0-9;?]*[A-Za-z]")


class PageError(Exception):
    """A block of a page failed."""


def executed(text: str, page: str) -> str:
    """The page with the output of its blocks below them.

    Python blocks share one namespace, shell blocks one temporary folder with them.

    Raises:
        PageError: with the block and what it said.
    """
    namespace: dict[str, Any] = {"__name__": page}

    def run(match: re.Match[str]) -> str:
        try:
            output = _python(match[2], page, namespace) if match[1] == "python" else _shell(match[2])
        except Exception as error:
            raise PageError(f"{page}: {error!r} in this block:\n{match[2]}") from error
        output = CONTROL.sub("", output).rstrip()
        return f"{match[0]}\n\n:::{{code-block}} text\n:class: output\n{output}\n:::\n" if output else match[0]

    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return BLOCK.sub(run, text)
        finally:
            os.chdir(before)


def _python(code: str, page: str, namespace: dict[str, Any]) -> str:
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(StringIO()):
        exec(compile(code, page, "exec"), namespace)
    return printed.getvalue()


def _shell(code: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e"], input=code, capture_output=True, text=True, env={**os.environ, "PATH": path, "COLUMNS": "100"}
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _read_page(app: Sphinx, name: str, content: list[str]) -> None:
    if name.startswith("tutorials/"):
        from sphinx.errors import ExtensionError

        try:
            content[0] = executed(content[0], name)
        except PageError as error:
            raise ExtensionError(str(error), error) from error


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read_page)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
