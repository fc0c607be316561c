"""Every architecture of the zoo, planned on the meta device."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...discovery import PrunableWeight, walk
from ...model import plan
from ...reporting import LayerRecord
from ..isolate import Outcome, isolated, one_line
from .architecture import Architecture, preload
from .families import LeftOutError, small_inputs

_UNUSUAL = 997
_ENDS = ("first layer", "last layer")


@dataclass(frozen=True)
class ZooPlan:
    """What `sao_prune.plan` says of one architecture.

    Attributes:
        architecture: which one.
        parameters: parameters of the whole model.
        layers: layers that would be pruned; ``weights`` in all, of which ``kept`` stay.
        even: of these layers, how many have a group count that divides both sides.
        off_target: of these layers, how many miss the requested sparsity by more than a percentage point.
        skipped: layers skipped, counted by reason.
        skipped_weights: their weights.
        outside: entries of other tensors with two or more dimensions (embeddings, raw parameters).
        findings: what is not as it must be, one line each.
        seconds: wall-clock time to build and plan.
        left_out: why it is none of the zoo: no small model of a transformers family can be made, or none that runs.
        error: why there is no plan. An architecture whose every layer but first and last is skipped for a
            reason has no error and no ``layers``.
    """

    architecture: Architecture
    parameters: int = 0
    layers: int = 0
    weights: int = 0
    kept: int = 0
    even: int = 0
    off_target: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_weights: int = 0
    outside: int = 0
    findings: tuple[str, ...] = ()
    seconds: float = 0.0
    left_out: str | None = None
    error: str | None = None

    @property
    def uneven(self) -> int:
        """Pruned layers whose sets differ in size."""
        return self.layers - self.even

    @property
    def failure(self) -> str | None:
        """What is wrong, in one line; ``None`` if nothing is."""
        return self.error or ("; ".join(self.findings) or None)


@dataclass(frozen=True)
class PlanTask:
    """One architecture to plan, at a sparsity."""

    architecture: Architecture
    sparsity: float


def plan_zoo(chosen: Sequence[Architecture], sparsity: float = 0.96875, *, jobs: int = 1) -> Iterator[ZooPlan]:
    """Plan architectures on the meta device, each in a process of its own.

    Args:
        chosen: from `architectures`.
        sparsity: as requested, in [0, 1).
        jobs: processes at a time.

    Yields:
        One `ZooPlan` an architecture, in the order of completion; failures are in it, not raised.
    """
    tasks = [PlanTask(architecture, sparsity) for architecture in chosen]
    for outcome in isolated(plan_one, tasks, jobs=jobs, preload=preload(chosen)):
        yield _planned(outcome)


def _planned(outcome: Outcome[PlanTask, ZooPlan]) -> ZooPlan:
    return outcome.value or ZooPlan(outcome.item.architecture, error=outcome.error)


def plan_one(task: PlanTask) -> ZooPlan:
    """Build one architecture on the meta device, plan it and check that the plan makes sense."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = ZooPlan(task.architecture)
    try:
        if task.architecture.library == "transformers":
            model = task.architecture.build()
            small_inputs(model)
        else:
            model = task.architecture.build_on_meta()
        result = replace(result, parameters=sum(p.numel() for p in model.parameters()))
        weights = {weight.name: weight for weight in walk(model)}
        reasons = Counter(_reason(weight.reason) for weight in weights.values() if weight.reason)
        result = replace(
            result,
            skipped=dict(reasons),
            skipped_weights=sum(weight.numel for weight in weights.values() if weight.reason),
            outside=sum(p.numel() for p in model.parameters() if p.dim() > 1) - sum(w.numel for w in weights.values()),
        )
        if len(weights) == reasons.total() > sum(reasons[end] for end in _ENDS):
            return replace(result, seconds=time.perf_counter() - start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = plan(model, sparsity=task.sparsity)
    except LeftOutError as reason:
        return replace(result, left_out=str(reason), seconds=time.perf_counter() - start)
    except Exception as error:
        return replace(result, error=one_line(error), seconds=time.perf_counter() - start)
    pruned = report.pruned
    return replace(
        result,
        layers=len(pruned),
        weights=sum(layer.total for layer in pruned),
        kept=report.nnz,
        even=sum(_is_even(layer, weights[layer.name]) for layer in pruned),
        off_target=len(report.off_target()),
        findings=tuple(findings(task.architecture, model, [weights[layer.name] for layer in pruned])),
        seconds=time.perf_counter() - start,
    )


def _is_even(layer: LayerRecord, weight: PrunableWeight) -> bool:
    groups = layer.groups or 1
    return all(side % groups == 0 for side in weight.matrix)


def _reason(reason: str) -> str:
    """A reason without the numbers and names that would make each layer its own."""
    return "tied to what is no layer to prune" if reason.startswith("tied to") else reason.partition(":")[0]


def findings(architecture: Architecture, model: nn.Module, pruned: Sequence[PrunableWeight]) -> Iterator[str]:
    """What must not be in a plan, told from the model alone and not from the walk that made the plan.

    A parameter pruned twice; a classifier that is pruned, known by its number of outputs; a convolution that reads
    the image.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    ids = [id(parameters[weight.name]) for weight in pruned]
    if len(set(ids)) < len(ids):
        yield f"{len(ids) - len(set(ids))} parameters are pruned twice"
    classes = getattr(model, "num_classes", None)
    if architecture.library == "torchvision" or any(weight.shape[0] == classes for weight in pruned):
        yield from (f"{name} is a classifier" for name in _pruned_classifiers(architecture))
    for weight in pruned:
        module = modules[weight.module]
        if isinstance(module, nn.modules.conv._ConvNd) and module.in_channels == 3:
            yield f"{weight.name} reads the image"


def _pruned_classifiers(architecture: Architecture) -> list[str]:
    """Layers to prune whose outputs are a multiple of the classes, for a number of classes that no width divides."""
    try:
        model = architecture.build_on_meta(num_classes=_UNUSUAL)
    except TypeError:
        return []
    return [weight.name for weight in walk(model) if weight.reason is None and weight.shape[0] % _UNUSUAL == 0]
