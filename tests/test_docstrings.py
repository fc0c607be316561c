"""Every example in every docstring runs, and what a machine can see of a docstring holds of every public one."""

import doctest
import functools
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from pathlib import Path
from types import GenericAlias, ModuleType

import pytest

import sao_prune

MODULES = sorted(m.name for m in pkgutil.walk_packages(sao_prune.__path__, "sao_prune."))
ROOMS = ("", ".algorithms", ".analysis", ".blocks", ".discovery", ".models", ".nn", ".prune", ".topology", ".weights")
FILES = sorted(Path(sao_prune.__file__).parent.rglob("*.py"))

# Terms of our own for what the field has a word for, and the word.
WORDS = {
    r"optimis(er|ation|ing|ed?\b)": "optimizer, optimization",
    r"features first\b": "column-major",
    r"put off\b": "deferred",
    r"followers?\b": "fused module, epilogue",
    r"slopes?\b": "derivative",
    r"foret(ell|old)\w*": "preview",
    r"makers?\b": "generator",
    r"shares? of zeros": "sparsity",
    r"left alone": "skipped",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if name.startswith("sao_prune.integrations."):
        pytest.importorskip(name.rpartition(".")[2])
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def faults(thing: object) -> list[str]:
    """What the docstring of a public class or function lacks."""
    text = inspect.getdoc(thing) or ""
    lines = text.splitlines()
    if not lines:
        return ["a docstring"]
    lacks = []
    if not lines[0].endswith((".", "?")) or (len(lines) > 1 and lines[1]):
        lacks.append("a first line that is one sentence, with an empty line after it")
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        named = [name for name in signature.parameters if re.search(rf"^\s+\W*{name}\b[^:]*:", text, re.MULTILINE)]
        if len(signature.parameters) > 1 and len(named) < len(signature.parameters):
            lacks.append(f"Args: {', '.join(sorted(set(signature.parameters) - set(named)))}")
        returned = signature.return_annotation
        if returned not in (None, "None", "NoReturn", inspect.Signature.empty) and "Returns:" not in text:
            lacks.append("Returns:")
        if ">>>" not in text:
            lacks.append("an example")
    return lacks


def is_class(thing: object) -> bool:
    """Whether it is a class, and not the alias of a type: Python 3.10 takes that for one as well."""
    return inspect.isclass(thing) and not isinstance(thing, GenericAlias)


def public(module: ModuleType) -> list[tuple[str, object]]:
    """The classes and functions that a package offers."""
    found = ((name, getattr(module, name)) for name in getattr(module, "__all__", ()))
    return [(name, thing) for name, thing in found if is_class(thing) or inspect.isfunction(thing)]


@pytest.mark.parametrize("room", ROOMS)
def test_public_docstrings_say_what_a_caller_needs(room: str) -> None:
    module = importlib.import_module("sao_prune" + room)
    lacking = {name: lacks for name, thing in public(module) if (lacks := faults(thing))}
    assert not lacking


@functools.cache
def prose(path: Path) -> str:
    """Comments and strings of a file: docstrings, errors, reports."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return "\n".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize("word", WORDS)
def test_the_words_are_the_fields(word: str) -> None:
    root = Path(sao_prune.__file__).parent
    found = {}
    for path in FILES:
        relative = path.relative_to(root)
        if hits := re.findall(rf"\b{word}", prose(path), re.IGNORECASE):
            found[str(relative)] = len(hits)
    assert not found, f"say {WORDS[word]!r}"
