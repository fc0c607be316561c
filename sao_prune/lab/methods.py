"""The methods of the comparison: what a name in a recipe does to a dense network."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

import sao_prune

from .cost import Cost, multiply_adds
from .errors import LabError
from .schema import Scalar, rule, unknown
from .structured import structured
from .training.spec import TrainSpec

Examples = tuple[Tensor, Tensor]
_PRUNINGS = 20


@dataclass(frozen=True)
class LabMethod:
    """What a name stands for.

    Attributes:
        pruner: a method class of the library; none for dense and structured.
        preset: the options that the name fixes.
        trained: prune what a dense training left (the suffix -T), instead of the initial weights.
        needs_data: it decides by examples from the training set.
        per_class: how many of each class; ten is what GraSP takes, and with ten classes about one batch for SNIP.
        structured: whole channels go, as many as leave the multiply-adds that SAO would leave at the same amount.
        gradual: pruned in steps over the first half of the training after, on Zhu and Gupta's cubic schedule.
    """

    label: str
    pruner: str | None
    preset: Mapping[str, Scalar] = field(default_factory=dict)
    trained: bool = False
    needs_data: bool = False
    per_class: int = 10
    structured: bool = False
    gradual: bool = False


# -S: initialise, prune, train. -T: initialise, train dense, prune, train again (thesis section 3.5.4).
METHODS: dict[str, LabMethod] = {
    "dense": LabMethod("Dense", None),
    "sao": LabMethod("SAO", "SAO"),
    "sao-iso": LabMethod("SAO isometric", "SAO", {"residual": "isometric", "measure": False}, needs_data=True),
    "rg-s": LabMethod("RG-S", "RG", {"values": "keep"}),
    "rg-t": LabMethod("RG-T", "RG", {"values": "keep"}, trained=True),
    "rg-n": LabMethod("RG-N", "RG", {"values": "normal"}),
    "rg-u": LabMethod("RG-U", "RG", {"values": "uniform"}),
    "gmp-s": LabMethod("GMP-S", "GMP"),
    "gmp-t": LabMethod("GMP-T", "GMP", trained=True),
    "gmp-gradual": LabMethod("GMP gradual", "GMP", trained=True, gradual=True),
    "lmp-s": LabMethod("LMP-S", "LMP"),
    "lmp-t": LabMethod("LMP-T", "LMP", trained=True),
    "lmp-gradual": LabMethod("LMP gradual", "LMP", trained=True, gradual=True),
    "lrp-s": LabMethod("LRP-S", "LRP"),
    "lrp-t": LabMethod("LRP-T", "LRP", trained=True),
    "eoi": LabMethod("EOI", "EOI"),
    "snip": LabMethod("SNIP", "SNIP", needs_data=True),
    "grasp": LabMethod("GraSP", "GraSP", needs_data=True),
    "synflow": LabMethod("SynFlow", "SynFlow", needs_data=True),
    "project": LabMethod("Project", "Project", trained=True, needs_data=True, per_class=50),
    "project-random": LabMethod(
        "Project, random sets", "Project", {"topology": "ramanujan"}, trained=True, needs_data=True, per_class=50
    ),
    "two-four-t": LabMethod("2:4-T", "NM", trained=True),
    "two-four-permuted-t": LabMethod("2:4-T, permuted", "NM", {"permute": True}, trained=True),
    "rewire": LabMethod("Rewire", "Rewire"),
    "rewire-random": LabMethod("Random moves", "Rewire", {"random": True}),
    "set": LabMethod("SET", "SET"),
    "set-kernel": LabMethod("SET, kernels", "SET", {"unit": "kernel"}),
    "rigl": LabMethod("RigL", "RigL"),
    "rigl-kernel": LabMethod("RigL, kernels", "RigL", {"unit": "kernel"}),
    "rigl-block": LabMethod("RigL, tiles", "RigL", {"unit": "block"}),
    "structured-s": LabMethod("Structured-S", None, structured=True),
    "structured-t": LabMethod("Structured-T", None, structured=True, trained=True),
}


@dataclass(frozen=True)
class MethodSpec:
    """A method of a recipe: its name, the library's options for it, and what tables and figures call it."""

    shorthand: ClassVar[str] = "name"

    name: str = rule(choices=METHODS)
    options: Mapping[str, Scalar] = field(default_factory=dict)
    label: str | None = None

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        if self.label:
            return self.label
        extra = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return METHODS[self.name].label + (f" ({extra})" if extra else "")

    @property
    def is_dense(self) -> bool:
        """Nothing is pruned."""
        return METHODS[self.name].pruner is None and not self.is_structured

    @property
    def is_structured(self) -> bool:
        """Whole channels go, so that nothing is left to mask."""
        return METHODS[self.name].structured

    @property
    def is_gradual(self) -> bool:
        """Pruning goes on while the network trains."""
        return METHODS[self.name].gradual

    @property
    def is_trained_first(self) -> bool:
        """Pruning comes after a dense training."""
        return METHODS[self.name].trained

    @property
    def draws_values(self) -> bool:
        """Its initial values have the scale of its density already, or are trained ones."""
        method = METHODS[self.name]
        fresh = self.build(1.0) if method.pruner in ("RG",) else None
        own = method.pruner in ("SAO", "EOI", "Rewire") or (fresh is not None and fresh.values != "keep")
        return own or method.trained or method.pruner is None

    @property
    def has_blocks(self) -> bool:
        """What it leaves is dense or made of fixed blocks, which can be held orthogonal."""
        return self.is_dense or METHODS[self.name].pruner in ("SAO", "RG", "Project")

    @property
    def is_moving(self) -> bool:
        """Entries move while it trains."""
        method = None if METHODS[self.name].pruner is None else self.build(1.0)
        return method is not None and method.moving

    def problem(self) -> tuple[str, str] | None:
        """What is wrong with the options, if anything."""
        method = METHODS[self.name]
        allowed = [] if method.pruner is None else _free_options(method)
        for key in self.options:
            if key not in allowed:
                return "options", unknown(f"option of {self.name}", key, allowed)
        try:
            self.build(gain=1.0)
        except (TypeError, ValueError) as error:
            return "options", str(error)
        return None

    @property
    def needs_data(self) -> bool:
        """It cannot decide without examples."""
        return METHODS[self.name].needs_data

    @property
    def per_class(self) -> int:
        """Examples of each class that it takes."""
        return METHODS[self.name].per_class

    def build(self, gain: float, examples: Examples | None = None) -> Any:
        """The library's method object; None for dense and structured.

        Args:
            gain: the recipe's, for methods that draw values.
            examples: images and labels, for methods that need them; without, the method can plan but not prune.
        """
        method = METHODS[self.name]
        if method.pruner is None:
            return None
        cls = getattr(sao_prune, method.pruner)
        takes = {f.name for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {"gain": gain} if "gain" in takes else {}
        if examples is not None:
            given.update({key: value for key, value in zip(("inputs", "targets"), examples) if key in takes})
        if "initial" in takes:
            given["initial"] = sao_prune.SAO(gain=gain)
        return cls(**{**given, **method.preset, **self.options})


class HasGain(Protocol):
    """Settings of a training, of which the gain counts here."""

    @property
    def gain(self) -> float:
        """The recipe's gain, for methods that draw values."""


class Configuration(Protocol):
    """What pruning has to know of a configuration of a recipe."""

    @property
    def method(self) -> MethodSpec:
        """The method and its options."""

    @property
    def prune(self) -> Mapping[str, Any]:
        """The options of `sao_prune.apply`."""

    @property
    def setting(self) -> HasGain:
        """The recipe's settings."""

    @property
    def train(self) -> TrainSpec:
        """How it is trained."""


@dataclass(frozen=True)
class Pruned:
    """What pruning left.

    Attributes:
        sparsity: of the pruned layers.
        parameters, nonzero: of the whole network, biases and norms included.
        flops: multiply-adds of one image that meet a weight that is not zero; ``dense_flops`` before pruning.
        note: what a reader must know.
        residuals: the residual blocks in execution order and the whole network, where they were measured.
    """

    sparsity: float
    parameters: int
    nonzero: int
    flops: int
    dense_flops: int
    note: str = ""
    residuals: tuple[sao_prune.algorithms.ResidualRecord, ...] = ()

    def said(self) -> dict[str, Any]:
        """For a result; residual blocks only where they were measured."""
        said = dataclasses.asdict(self)
        if not self.residuals:
            del said["residuals"]
        return said


def prune_network(
    model: nn.Module,
    configuration: Configuration,
    seed: int,
    example: Tensor,
    examples: Examples | None = None,
    measured: bool = False,
) -> Pruned:
    """Prune ``model`` in place, as a configuration of a recipe says.

    Args:
        example: a batch of one input; multiply-adds are counted for it.
        examples: images and labels of the training set, for methods that need them.
        measured: take the extreme singular values of residual blocks before and after, for methods that look for them.

    Raises:
        LabError: if the library refuses, with its reason.
    """
    method, cost = configuration.method, multiply_adds(model, example)
    if method.is_dense:
        parameters = sum(p.numel() for p in model.parameters())
        return Pruned(0.0, parameters, parameters, cost.total, cost.total)
    if method.is_structured:
        return _remove_channels(model, configuration, cost, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sao_prune.SparsityWarning)
            pruner = method.build(configuration.setting.gain, examples)
            residual = examples[0] if examples is not None and getattr(pruner, "residual", None) else None
            measured = measured and residual is not None
            if measured:
                pruner = dataclasses.replace(pruner, measure=True)
            report = sao_prune.apply(
                model,
                method=pruner,
                seed=seed,
                example_input=residual,
                **configuration.prune,  # type: ignore[arg-type]
            )
    except (TypeError, ValueError) as error:
        raise LabError(f"{method.title}: {error}") from error
    left = cost.after({layer.name: layer.achieved for layer in report.pruned})
    note = "; ".join(filter(None, (_residuals(report), _off_target(report))))
    residuals = tuple(report.residuals) if measured else ()
    return Pruned(report.sparsity, report.parameters, report.remaining, left, cost.total, note, residuals)


@dataclass(frozen=True)
class Gradual:
    """A network that is pruned while it trains.

    Attributes:
        pruner: to be stepped after every optimizer step.
    """

    pruner: sao_prune.Pruner
    _model: nn.Module
    _cost: Cost

    def left(self) -> Pruned:
        """What is left now."""
        report = sao_prune.report(self._model)
        flops = self._cost.after({layer.name: layer.achieved for layer in report.pruned})
        return Pruned(self.pruner.sparsity, report.parameters, report.remaining, flops, self._cost.total)


def schedule_network(model: nn.Module, configuration: Configuration, seed: int, example: Tensor, steps: int) -> Gradual:
    """Begin to prune ``model`` in place over ``steps`` optimizer steps, as a configuration of a recipe says.

    Raises:
        LabError: if the library refuses, with its reason.
    """
    cost, end = multiply_adds(model, example), steps // 2
    over = sao_prune.Schedule(0, end, min(_PRUNINGS, end + 1))
    try:
        pruner = sao_prune.schedule(
            model,
            configuration.method.build(configuration.setting.gain),
            over=over,
            seed=seed,
            **configuration.prune,  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        raise LabError(f"{configuration.method.title}: {error}") from error
    return Gradual(pruner, model, cost)


def _remove_channels(model: nn.Module, configuration: Configuration, cost: Cost, example: Tensor) -> Pruned:
    """Whole channels, until no more multiply-adds are left than SAO leaves at the same amount."""
    report = _plan(model, "sao", configuration)
    share = cost.after({layer.name: layer.achieved for layer in report.pruned}) / cost.total
    # Orthogonal rows have equal norms: one ranking over all layers would leave some of them a single channel.
    scope: Literal["global", "layer"] = "global" if configuration.method.is_trained_first else "layer"
    done = structured(model, example, share, scope)
    note = f"{done.share:.2%} of the multiply-adds are left, in {done.parameters:,} parameters, none of them zero"
    return Pruned(0.0, done.dense_parameters, done.parameters, done.flops, cost.total, note)


def check_method(model: nn.Module, configuration: Configuration) -> None:
    """Find out whether `prune_network` would work, touching no weight.

    Raises:
        LabError: if the library refuses, with its reason.
    """
    if configuration.method.is_moving:
        train = configuration.train
        if train.ema:
            raise LabError(f"{configuration.method.title}: masks that move have no average; leave ema out")
        if train.compile and configuration.method.build(1.0).hears:
            raise LabError(
                f"{configuration.method.title}: a compiled network does not tell gradients of absent entries"
            )
    if not configuration.method.is_dense:
        _plan(model, "sao" if configuration.method.is_structured else configuration.method.build(1.0), configuration)
        if configuration.method.is_trained_first and configuration.train.distill is not None:
            try:
                sao_prune.Distiller(model, copy.deepcopy(model), configuration.train.distill.options()).close()
            except ValueError as error:
                raise LabError(f"distill: {error}") from error


def _plan(model: nn.Module, method: Any, configuration: Configuration) -> sao_prune.Report:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sao_prune.SparsityWarning)
            return sao_prune.plan(model, method=method, **configuration.prune)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise LabError(f"{configuration.method.title}: {error}") from error


def _residuals(report: sao_prune.Report) -> str:
    """How many residual blocks are exactly orthogonal, nearly, and not."""
    kinds = Counter(record.status for record in report.residuals if record.name)
    return "residual blocks: " + ", ".join(f"{kinds[kind]} {kind}" for kind in kinds) if kinds else ""


def _off_target(report: sao_prune.Report) -> str:
    off = report.off_target()
    if not off:
        return ""
    named = ", ".join(f"{layer.name} {layer.achieved:.2%}" for layer in off[:3]) + (", .." if len(off) > 3 else "")
    return f"{len(off)} of {len(report.pruned)} layers miss the requested sparsity by over a point: {named}"


def _free_options(method: LabMethod) -> list[str]:
    cls = getattr(sao_prune, str(method.pruner))
    given = ("inputs", "targets", "loss", "initial")
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name not in method.preset and f.name not in given]
