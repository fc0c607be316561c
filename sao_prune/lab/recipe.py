"""A recipe: the grid of cells that one comparison trains, written in YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .data import dataset_loaders
from .errors import RecipeError
from .methods import MethodSpec
from .schema import Scalar, read_yaml, rule
from .train.spec import TrainSpec

# Part of every key: raise it when training changes in a way that makes old results incomparable.
RESULT_FORMAT = 1


@dataclass(frozen=True)
class DataSpec:
    """Which images, and which part of every training class the learning rates are chosen on."""

    shorthand: ClassVar[str] = "name"

    name: str = rule(choices=dataset_loaders())
    holdout: float = rule(0.2, above=0, below=1)


@dataclass(frozen=True)
class NetworkSpec:
    """A network of timm's registry (this project's are in it), at one or more depths."""

    shorthand: ClassVar[str] = "name"

    name: str
    depth: tuple[int, ...] | None = rule(None, least=1)
    options: Mapping[str, Scalar] = field(default_factory=dict)

    def problem(self) -> tuple[str, str] | None:
        """``depth`` has its own key."""
        return ("options", "depth has a key of its own") if "depth" in self.options else None

    def grid(self) -> list[dict[str, Scalar]]:
        """The options of every network, one a depth."""
        if self.depth is None:
            return [dict(self.options)]
        return [{**self.options, "depth": depth} for depth in self.depth]


@dataclass(frozen=True)
class PruneSpec:
    """How much goes, in one of three units, and from where."""

    sparsity: tuple[float, ...] | None = rule(None, least=0, below=1)
    degree: tuple[int, ...] | None = rule(None, least=1)
    groups: tuple[int, ...] | None = rule(None, least=1)
    skip_first: bool = True
    skip_last: bool = True

    def problem(self) -> tuple[str, str] | None:
        """Exactly one unit."""
        units = [unit for unit in ("sparsity", "degree", "groups") if getattr(self, unit) is not None]
        if len(units) == 1:
            return None
        return (
            units[-1] if units else "",
            f"give one of sparsity, degree and groups, got {' and '.join(units) or 'none'}",
        )

    def grid(self) -> list[dict[str, Scalar]]:
        """What `sao_prune.apply` takes, one mapping an amount."""
        unit = next(u for u in ("sparsity", "degree", "groups") if getattr(self, u) is not None)
        where = {"skip_first": self.skip_first, "skip_last": self.skip_last}
        return [{unit: amount, **where} for amount in getattr(self, unit)]


@dataclass(frozen=True)
class LearningRates:
    """The grid that every method's learning rate is chosen from, and the seeds it is chosen with."""

    grid: tuple[float, ...] = rule(above=0)
    seeds: tuple[int, ...] = rule((0,), least=0)

    def problem(self) -> tuple[str, str] | None:
        """No value twice."""
        for key in ("grid", "seeds"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                return key, "a value is given twice"
        return None


@dataclass(frozen=True)
class Recipe:
    """Everything that one comparison needs."""

    name: str
    data: DataSpec
    network: NetworkSpec
    prune: PruneSpec
    methods: tuple[MethodSpec, ...]
    lr: LearningRates
    train: TrainSpec
    seeds: tuple[int, ...] = rule((0, 1, 2), least=0)
    gain: float = rule(1.0, above=0)
    title: str | None = None

    def problem(self) -> tuple[str, str] | None:
        """A name that can be a folder's, and nothing twice."""
        if not self.name.replace("_", "").replace("-", "").isalnum():
            return "name", f"letters, digits, - and _ only (it names a folder), got {self.name!r}"
        if len(set(self.seeds)) < len(self.seeds):
            return "seeds", "a seed is given twice"
        titles = [method.title for method in self.methods]
        if len(set(titles)) < len(titles):
            return "methods", "two methods have the same label; tell them apart with label:"
        return None

    def arms(self) -> Iterator[Arm]:
        """Every network x amount x method; dense once a network, since no amount changes it."""
        for options in self.network.grid():
            for method in self.methods:
                for amount in [{}] if method.is_dense else self.prune.grid():
                    title = ", ".join([method.title, *self.varying(options, amount)])
                    yield Arm(self.data.name, self.network.name, options, self.gain, method, amount, title)

    def varying(self, options: Mapping[str, Scalar], amount: Mapping[str, Scalar]) -> Iterator[str]:
        """What tells an arm from the others of its method."""
        if len(self.network.grid()) > 1:
            yield f"N = {options['depth']}"
        if len(self.prune.grid()) > 1 and amount:
            yield next(f"{unit} {value}" for unit, value in amount.items() if not unit.startswith("skip_"))


@dataclass(frozen=True)
class Arm:
    """One method on one network at one amount: what the learning rate is chosen for, and one row of the table.

    Attributes:
        prune: what `sao_prune.apply` takes; empty for dense.
        title: its name in tables: the method, and what else the recipe's grid varies.
    """

    data: str
    network: str
    network_options: Mapping[str, Scalar]
    gain: float
    method: MethodSpec
    prune: Mapping[str, Scalar]
    title: str

    def cell(self, kind: str, seed: int, **training: Any) -> Cell:
        """The cell of this arm for one seed."""
        return Cell(kind, self, seed, **training)


@dataclass(frozen=True)
class Cell:
    """One unit of work: a training (``select`` on the held-out part, ``final`` on the test set) or a ``spectrum``.

    Its key is a digest of all that its result depends on, so equal keys mean equal results.
    """

    kind: str
    arm: Arm
    seed: int
    lr: float | None = None
    train: TrainSpec | None = None
    holdout: float | None = None

    def content(self) -> dict[str, Any]:
        """What the key is made of, ready for JSON; names for tables are not part of it."""
        content = asdict(self)
        del content["arm"]["title"]
        del content["arm"]["method"]["label"]
        return content

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits of a SHA-256."""
        text = json.dumps([RESULT_FORMAT, self.content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """One line for a progress display."""
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{self.arm.title}{rate}, seed {self.seed}"


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: naming the file, the line and the key.
    """
    return read_yaml(path, Recipe)


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of one that is shipped (``digits``).

    Raises:
        RecipeError: if there is neither, naming those that are shipped.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"no recipe {name!r}: neither a file nor one of {', '.join(sorted(shipped)) or 'the shipped ones'}"
    )


def shipped_recipes() -> dict[str, Path]:
    """Recipes by name: inside an installed package, at the top of the repository in a checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "recipes", here.parents[2] / "recipes"):
        if found := sorted(folder.glob("*.yaml")):
            return {path.stem: path for path in found}
    return {}
