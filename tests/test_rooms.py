"""The order of the house: what imports what, told by the source, imports within functions and for types included."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sao_prune

ROOT = Path(sao_prune.__file__).parent

# Data flows down this list; a room imports only from rooms above it.
ORDER = (
    "_torch",  # no rooms: leaves that import nothing of ours
    "seeds",
    "files",
    "naming",
    "tables",
    "scheduling",
    "replaced",
    "optimizers",
    "state_file",
    "discovery",  # WHERE: the weights of any model
    "topology",  # WHICH edges; before allocation, which asks what group counts and sizes are feasible
    "allocation",  # HOW MUCH
    "options",
    "weights",  # WHAT values
    "algorithms",  # methods combine them
    "reporting",
    "prune",  # torch's hooks
    "nn",
    "layouts",
    "held",
    "plain",
    "blocks",  # run them fast
    "sites",
    "orders",
    "orthogonality",
    "analysis",
    "model",  # the verbs
    "moving",
    "pruner",
    "state_names",
    "state_fit",
    "checkpoint",
    "exporting",
    "distillation",
    "models",
    "integrations",
    "figures",
    "lab",
    "cli",
    "__main__",
)

# Files that import rooms of ours within functions: a command that answers before torch is there, and what needs an
# optional package.
LATE = {"cli.py", *(f"blocks/backends/triton/{name}.py" for name in ("compiled", "launch", "suits"))}


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of ours that a file imports, dotted, and whether it does so at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    package = ("sao_prune", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            start = ".".join(filter(None, (base, node.module)))
            found = [f"{start}.{alias.name}" for alias in node.names]
        yield from ((name, id(node) in top) for name in found if name.split(".")[0] == "sao_prune")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_the_order_is_of_the_rooms_that_there_are() -> None:
    assert sorted(ORDER) == sorted({room(path) for path in FILES})


@pytest.mark.parametrize("name", ORDER)
def test_a_room_imports_only_from_rooms_before_it(name: str) -> None:
    place = {each: index for index, each in enumerate(ORDER)}
    wrong = []
    for path in FILES:
        if room(path) == name:
            for module, _ in imports(path):
                # The package itself, with the public names, stands behind the verbs.
                target = ([*module.split("."), ""])[1]
                behind = place[name] > place["exporting"] if target not in place else place[target] <= place[name]
                if not behind:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_rooms_are_imported_at_the_top_of_a_file() -> None:
    late = {path.relative_to(ROOT).as_posix() for path in FILES if not all(top for _, top in imports(path))}
    assert late == LATE


def offered(path: Path) -> set[str]:
    """What a package lists in its ``__all__`` but whole modules, without importing it."""
    names: set[str] = set()
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = set(ast.literal_eval(node.value))
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is None:
            modules |= {alias.name for alias in node.names}
    return names - modules


@pytest.mark.parametrize("folder", sorted(path.parent for path in ROOT.rglob("__init__.py")), ids=lambda p: p.name)
def test_no_module_has_the_name_of_a_public_function(folder: Path) -> None:
    modules = {path.stem for path in folder.iterdir()} - {"__init__"}
    assert not {*modules, folder.name} & offered(folder / "__init__.py")
