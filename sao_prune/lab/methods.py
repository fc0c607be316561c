"""The methods of the comparison: what a name in a recipe does to a dense network."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

import sao_prune

from .cost import multiply_adds
from .errors import LabError
from .schema import Scalar, rule, unknown


@dataclass(frozen=True)
class LabMethod:
    """What a name stands for.

    Attributes:
        pruner: a method class of the library; none for dense.
        preset: the options that the name fixes.
        trained: prune what a dense training left (the suffix -T), instead of the initial weights.
        needs_data: its scores need a batch of the training set.
    """

    label: str
    pruner: str | None
    preset: Mapping[str, Scalar] = field(default_factory=dict)
    trained: bool = False
    needs_data: bool = False


# -S: initialise, prune, train. -T: initialise, train dense, prune, train again (thesis section 3.5.4).
METHODS: dict[str, LabMethod] = {
    "dense": LabMethod("Dense", None),
    "sao": LabMethod("SAO", "SAO"),
    "rg-s": LabMethod("RG-S", "RG", {"values": "keep"}),
    "rg-t": LabMethod("RG-T", "RG", {"values": "keep"}, trained=True),
    "rg-n": LabMethod("RG-N", "RG", {"values": "normal"}),
    "rg-u": LabMethod("RG-U", "RG", {"values": "uniform"}),
    "gmp-s": LabMethod("GMP-S", "GMP"),
    "gmp-t": LabMethod("GMP-T", "GMP", trained=True),
    "lmp-s": LabMethod("LMP-S", "LMP"),
    "lmp-t": LabMethod("LMP-T", "LMP", trained=True),
    "lrp-s": LabMethod("LRP-S", "LRP"),
    "lrp-t": LabMethod("LRP-T", "LRP", trained=True),
    "eoi": LabMethod("EOI", "EOI"),
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
        return METHODS[self.name].pruner is None

    @property
    def is_trained_first(self) -> bool:
        """Pruning comes after a dense training."""
        return METHODS[self.name].trained

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

    def build(self, gain: float) -> Any:
        """The library's method object, with the recipe's gain where the method draws values; None for dense."""
        method = METHODS[self.name]
        if method.pruner is None:
            return None
        cls = getattr(sao_prune, method.pruner)
        takes_gain = any(f.name == "gain" for f in dataclasses.fields(cls))
        return cls(**{**({"gain": gain} if takes_gain else {}), **method.preset, **self.options})


@dataclass(frozen=True)
class Pruned:
    """What pruning left.

    Attributes:
        sparsity: share of zeros in the pruned layers.
        parameters, nonzero: of the whole network, biases and norms included.
        flops: multiply-adds of one image that meet a weight that is not zero; ``dense_flops`` before pruning.
        note: what a reader must know.
    """

    sparsity: float
    parameters: int
    nonzero: int
    flops: int
    dense_flops: int
    note: str = ""


def prune_network(
    model: nn.Module, method: MethodSpec, gain: float, options: Mapping[str, Any], seed: int, image_shape: Sequence[int]
) -> Pruned:
    """Prune ``model`` in place.

    Args:
        options: what `sao_prune.apply` takes: the amount, ``skip_first``, ``skip_last``.
        image_shape: of one input, without the batch dimension; multiply-adds are counted for it.

    Raises:
        LabError: if the library refuses, with its reason.
    """
    cost = multiply_adds(model, image_shape)
    pruner = method.build(gain)
    if pruner is None:
        parameters = sum(p.numel() for p in model.parameters())
        return Pruned(0.0, parameters, parameters, cost.total, cost.total)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sao_prune.SparsityWarning)
            report = sao_prune.apply(model, method=pruner, seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise LabError(f"{method.title}: {error}") from error
    left = cost.after({layer.name: layer.achieved for layer in report.pruned})
    return Pruned(report.sparsity, report.parameters, report.remaining, left, cost.total, _off_target(report))


def check_method(model: nn.Module, method: MethodSpec, options: Mapping[str, Any]) -> None:
    """Find out whether `prune_network` would work, touching no weight.

    Raises:
        LabError: if the library refuses, with its reason.
    """
    if method.is_dense:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sao_prune.SparsityWarning)
            sao_prune.plan(model, method=method.build(1.0), **options)
    except (TypeError, ValueError) as error:
        raise LabError(f"{method.title}: {error}") from error


def _off_target(report: sao_prune.Report) -> str:
    off = report.off_target()
    if not off:
        return ""
    named = ", ".join(f"{layer.name} {layer.achieved:.2%}" for layer in off[:3]) + (", .." if len(off) > 3 else "")
    return f"{len(off)} of {len(report.pruned)} layers miss the requested sparsity by over a point: {named}"


def _free_options(method: LabMethod) -> list[str]:
    cls = getattr(sao_prune, str(method.pruner))
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name not in method.preset]
