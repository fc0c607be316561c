"""A recipe: the grid of trials that one comparison trains, written in YAML."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .data import DataSpec
from .data.names import is_sequences
from .document import Document
from .errors import RecipeError
from .methods import MethodSpec
from .robustness import RobustnessSpec
from .schema import Scalar, rule
from .training.spec import TrainSpec
from .width import groups_of, widened

_UNITS = ("sparsity", "degree", "groups")
INITIALISATIONS = ("delta", "orthogonal", "eco", "he", "fixup", "default")


@dataclass(frozen=True)
class NetworkSpec:
    """A network of timm's registry (this project's are in it), at one or more depths, widths and options.

    Every option may be a list; the comparison then has a network for every combination.

    Attributes:
        widen: options that are widths, with their values for dense: at an amount that leaves one of ``g`` weights they
            are multiplied with the square root of ``g``, so that multiply-adds stay.
    """

    shorthand: ClassVar[str] = "name"

    name: str
    depth: tuple[int, ...] | None = rule(None, ge=1)
    width: tuple[int, ...] | None = rule(None, ge=1)
    options: Mapping[str, Scalar | tuple[Scalar, ...]] = field(default_factory=dict)
    widen: Mapping[str, Scalar] = field(default_factory=dict)

    def problem(self) -> tuple[str, str] | None:
        """``depth`` and ``width`` have their own keys; what is widened is given once, as a number."""
        for key in ("depth", "width"):
            if key in self.options:
                return "options", f"{key} has a key of its own"
        for key, value in self.widen.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return "widen", f"{key} is a width: a whole number of at least 1, got {value!r}"
            if key in self.axes():
                return "widen", f"{key} is given twice"
        return None

    def axes(self) -> dict[str, tuple[Scalar, ...]]:
        """Every option with its values."""
        axes = {key: value if isinstance(value, tuple) else (value,) for key, value in self.options.items()}
        sizes = {key: getattr(self, key) for key in ("depth", "width")}
        return {**axes, **{key: value for key, value in sizes.items() if value is not None}}

    def grid(self) -> list[dict[str, Scalar]]:
        """The options of every network."""
        axes = self.axes()
        return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]

    def varying(self, options: Mapping[str, Scalar]) -> list[str]:
        """What tells the network with these options from the others, in words."""
        names = {"depth": "N = ", "width": "W = "}
        return [
            f"{names[key]}{options[key]}" if key in names else _in_words(key, options[key])
            for key, values in self.axes().items()
            if len(values) > 1
        ]


@dataclass(frozen=True)
class PruneSpec:
    """How much goes, in one of three units, and from where."""

    sparsity: tuple[float, ...] | None = rule(None, ge=0, lt=1)
    degree: tuple[int, ...] | None = rule(None, ge=1)
    groups: tuple[int, ...] | None = rule(None, ge=1)
    skip_first: bool = True
    skip_last: bool = True
    fit: str = rule("nearest", choices=("nearest", "regular", "exact"))
    distribution: str = rule("uniform", choices=("uniform", "erk"))

    def problem(self) -> tuple[str, str] | None:
        """Exactly one unit."""
        units = [unit for unit in _UNITS if getattr(self, unit) is not None]
        if len(units) == 1:
            return None
        return (
            units[-1] if units else "",
            f"give one of sparsity, degree and groups, got {' and '.join(units) or 'none'}",
        )

    def grid(self) -> list[dict[str, Scalar]]:
        """What `sao_prune.apply` takes, one mapping an amount."""
        unit = next(u for u in _UNITS if getattr(self, u) is not None)
        where: dict[str, Scalar] = {"skip_first": self.skip_first, "skip_last": self.skip_last}
        extra = {"fit": (self.fit, "nearest"), "distribution": (self.distribution, "uniform")}
        where.update({key: value for key, (value, default) in extra.items() if value != default})
        return [{unit: amount, **where} for amount in getattr(self, unit)]

    def varying(self, amount: Mapping[str, Scalar]) -> list[str]:
        """What tells this amount from the others, in words."""
        if len(self.grid()) < 2 or not amount:
            return []
        unit, value = next((unit, value) for unit, value in amount.items() if unit in _UNITS)
        return [f"{100 * float(value):.5g} %" if unit == "sparsity" else f"{unit} {value}"]


@dataclass(frozen=True)
class LearningRates:
    """The grid that every method's learning rate is chosen from, and the seeds it is chosen with.

    Attributes:
        extend: how many rates beyond the grid are tried for a method whose best one is the grid's lowest or highest;
            a grid of one rate stays as it is.
    """

    grid: tuple[float, ...] = rule(gt=0)
    seeds: tuple[int, ...] = rule((0,), ge=0)
    extend: int = rule(0, ge=0)

    def problem(self) -> tuple[str, str] | None:
        """No value twice."""
        for key in ("grid", "seeds"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                return key, "a value is given twice"
        return None

    def beyond(self, rates: Collection[float], best: float) -> float | None:
        """The rate that follows ``rates`` on the side of the best one, in their steps; none if it is between others.

        Example:
            >>> rates = LearningRates((0.3, 0.1, 0.03), extend=2)
            >>> rates.beyond(rates.grid, 0.3), rates.beyond(rates.grid, 0.1), rates.beyond(rates.grid, 0.03)
            (1.0, None, 0.01)
        """
        inwards = sorted(rates, reverse=best == max(rates))
        if best != inwards[0]:
            return None
        near = inwards[0] / inwards[1]
        far = inwards[1] / inwards[2] if len(inwards) > 2 else near
        # Two steps take turns in grids such as 0.3, 0.1, 0.03.
        return float(f"{inwards[0] * (far if 0.5 < far / near < 2 else near):.6g}")


@dataclass(frozen=True)
class Setting:
    """One case of a recipe: the grid network x amount x method x seed on one data set, under one training.

    Attributes:
        gain: scale of the orthogonal initial weights.
        init: initial weights of convolutions: orthogonal on the centre tap (``delta``), on the flattened kernel
            (``orthogonal``), at every frequency (``eco``); for all layers He's (``he``), Fixup's (``fixup``), or the
            constructor's (``default``).
        robustness: how trained networks are attacked and certified, beside their accuracy; ``None`` for not at all.
        label: what tells this case from the others.
    """

    data: DataSpec
    network: NetworkSpec
    prune: PruneSpec
    methods: tuple[MethodSpec, ...]
    lr: LearningRates
    train: TrainSpec
    seeds: tuple[int, ...] = rule((0, 1, 2), ge=0)
    gain: float = rule(1.0, gt=0)
    init: str = rule("delta", choices=INITIALISATIONS)
    robustness: RobustnessSpec | None = None
    label: str | None = None

    def problem(self) -> tuple[str, str] | None:
        """Nothing twice; what the width follows is known."""
        if self.network.widen and self.prune.degree is not None:
            return "network", "widen follows groups or sparsity, not degree"
        if self.network.widen and any(method.is_trained_first for method in self.methods):
            return "network", "widen makes networks for an amount: methods that start from a dense training have none"
        if len(set(self.seeds)) < len(self.seeds):
            return "seeds", "a seed is given twice"
        if is_sequences(self.data.name) and (self.train.mixup or self.train.cutmix):
            return "train", "sequences cannot be mixed: leave mixup and cutmix out"
        if is_sequences(self.data.name) and (self.train.adversarial or self.robustness or self.train.loss.is_certified):
            return "data", "attacks and certificates are for images: leave adversarial, robustness and the loss out"
        if self.train.hold and not all(method.has_blocks for method in self.methods):
            without = next(method.title for method in self.methods if not method.has_blocks)
            return "train", f"hold keeps blocks orthogonal, and {without} has none: give it a case of its own"
        titles = [method.title for method in self.methods]
        if len(set(titles)) < len(titles):
            return "methods", "two methods have the same label; tell them apart with label:"
        return None

    def configurations(self) -> Iterator[Configuration]:
        """Every network x amount x method; dense once a network, since no amount changes it."""
        for options in self.network.grid():
            for method in self.methods:
                for amount in [{}] if method.is_dense else self.prune.grid():
                    yield Configuration(self, options, method, amount)


@dataclass(frozen=True)
class Configuration:
    """One method on one network at one amount: what the learning rate is chosen for, and one row of the table.

    Attributes:
        options: of the network.
        prune: what `sao_prune.apply` takes; empty for dense.
    """

    setting: Setting
    options: Mapping[str, Scalar]
    method: MethodSpec
    prune: Mapping[str, Scalar]

    @property
    def network_options(self) -> dict[str, Scalar]:
        """The options that its network is built with."""
        groups = groups_of(self.prune)
        wider = {key: widened(int(value), groups) for key, value in self.setting.network.widen.items()}
        return {**self.options, **(wider if self.prune else self.setting.network.widen)}

    @property
    def network_title(self) -> str:
        """What tells its network from the recipe's others."""
        label = self.setting.label
        return ", ".join([*([label] if label else []), *self.setting.network.varying(self.options)])

    @property
    def amount_title(self) -> str:
        """What tells its amount from the others of its method."""
        return ", ".join(self.setting.prune.varying(self.prune))

    @property
    def title(self) -> str:
        """Its name in tables: the method, and what else the recipe varies."""
        return ", ".join(text for text in (self.method.title, self.network_title, self.amount_title) if text)

    @property
    def train(self) -> TrainSpec:
        """Its own training: of a -T method the one after pruning."""
        train = self.setting.train
        return train.further() if self.method.is_trained_first else train.first()

    @property
    def dense(self) -> Configuration:
        """The dense network that a -T method of this configuration starts from."""
        return Configuration(self.setting, self.options, MethodSpec("dense"), {})


@dataclass(frozen=True)
class Recipe:
    """A comparison: one or more cases that share a report."""

    name: str
    settings: tuple[Setting, ...]
    title: str | None = None

    def configurations(self) -> Iterator[Configuration]:
        """The configurations of all cases, in order."""
        return (configuration for setting in self.settings for configuration in setting.configurations())

    def every_configuration(self) -> list[Configuration]:
        """The configurations, and the dense ones that -T methods need though the recipe does not list them."""
        configurations = list(self.configurations())
        for configuration in [
            configuration.dense for configuration in configurations if configuration.method.is_trained_first
        ]:
            there = (
                a.setting == configuration.setting and a.options == configuration.options
                for a in configurations
                if a.method.is_dense
            )
            if not any(there):
                configurations.append(configuration)
        return configurations


@dataclass(frozen=True)
class _Head:
    name: str
    title: str | None = None

    def problem(self) -> tuple[str, str] | None:
        if not self.name.replace("_", "").replace("-", "").isalnum():
            return "name", f"letters, digits, - and _ only (it names a folder), got {self.name!r}"
        return None


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's file, with one of its profiles laid over it.

    Attributes:
        recipe: what it says.
        text: YAML that says the same with no profile, for the folder of the run.
        profiles: the names of all its profiles.
    """

    recipe: Recipe
    text: str
    profiles: tuple[str, ...]


def load_recipe(path: Path, profile: str | None = None) -> Recipe:
    """Read and check a recipe, with one of its profiles if named.

    Raises:
        RecipeError: naming the file, the line and the key.
    """
    return read_recipe(path, profile).recipe


def read_recipe(path: Path, profile: str | None = None) -> RecipeFile:
    """Read and check a recipe's file.

    ``profiles`` maps names to keys that replace those of the recipe, mapping by mapping; ``cases`` lists such keys, and
    each item makes a setting of its own.

    Raises:
        RecipeError: naming the file, the line and the key.
    """
    document = Document.read(path)
    whole, profiles = document.take("profiles")
    names = () if profiles is None else profiles.names()
    if profile is not None:
        overlay = None if profiles is None else profiles.child(profile)
        if overlay is None:
            raise RecipeError(f"{path} has no profile {profile!r}; it has {', '.join(names) or 'none'}")
        whole = whole.overlaid(overlay).with_suffix("name", f"-{profile}")
    head_node, body = whole.split("name", "title")
    head = head_node.build(_Head)
    body, cases = body.take("cases")
    parts = [body] if cases is None else [body.overlaid(case) for case in cases.items()]
    recipe = Recipe(head.name, tuple(part.build(Setting) for part in parts), head.title)
    titles = [configuration.title for configuration in recipe.configurations()]
    if len(set(titles)) < len(titles) and cases is not None:
        raise cases.error("two cases have the same configurations; tell them apart with label:")
    return RecipeFile(recipe, path.read_text(encoding="utf-8") if profile is None else whole.text(), names)


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


def _in_words(key: str, value: Scalar) -> str:
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return value if isinstance(value, str) else f"{key} {value}"
