"""The code in the documentation."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    """The fenced blocks of a page in one language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(page):
    """Run the Python blocks of a page, which share one namespace; returns it."""
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def extension(name):
    """A module of docs/_ext, which needs no Sphinx to be imported."""
    spec = spec_from_file_location(f"docs_{name}", ROOT / "docs" / "_ext" / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
