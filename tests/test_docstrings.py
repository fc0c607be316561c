"""Every example in every docstring runs, and what a machine can see of a docstring holds of every public one."""

import ast
import doctest
import functools
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
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
    r"what follows (it|them|(a|each) \w+)\b": "epilogue",
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


# ---- By the source alone --------------------------------------------------------------------------------------------

ROOT = Path(sao_prune.__file__).parents[1]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def mentioned(path: Path) -> frozenset[str]:
    """Names that a file of the package imports, takes from something, or has in short strings; elsewhere all words."""
    if path not in FILES:
        return frozenset(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
            found |= set(re.findall(r"\w+", node.value))
    return frozenset(found)


def test_functions_that_one_file_uses_alone_are_private() -> None:
    folders = [ROOT / name for name in ("tests", "benchmarks", "recipes", "docs")]
    others = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".rst")]
    where = [*FILES, *others, ROOT / "README.md"]
    times = Counter(name for path in where if path.is_file() for name in mentioned(path))
    lonely = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and not node.decorator_list
        if times[node.name] == (node.name in mentioned(path))
    ]
    assert not lonely


def raised(function: ast.FunctionDef) -> set[str]:
    """The errors that a function raises itself, not in a function within it."""
    nodes: list[ast.AST] = list(function.body)
    for node in nodes:
        inner = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, inner)]
    found = {ast.unparse(n.exc).partition("(")[0] for n in nodes if isinstance(n, ast.Raise) and n.exc is not None}
    return found - {"NotImplementedError"}


def raising(path: Path) -> Iterator[tuple[str, str]]:
    """Public functions and methods that raise errors, and their docstrings; of constructors the class's."""
    classes = [node for node in parsed(path).body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    for owner in (parsed(path), *classes):
        for node in (n for n in owner.body if isinstance(n, ast.FunctionDef)):
            starts = node.name in ("__init__", "__post_init__")
            if (starts or node.name[0] != "_") and raised(node):
                yield node.name, ast.get_docstring(owner if starts else node) or ""


def test_what_is_raised_is_documented() -> None:
    # Of commands the docstring is the help; of what overrides another's method that one's counts.
    lacking = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if path.name != "cli.py"
        for name, text in raising(path)
        if text and "Raises:" not in text and not text.startswith("See `")
    ]
    assert not lacking
