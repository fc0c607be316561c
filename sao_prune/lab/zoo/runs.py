"""The zoo at work: which architectures, each in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..isolate import Outcome, isolated
from .architecture import Architecture, preload
from .plans import ZooPlan
from .trial import RunTask, ZooRun, run_one

MEMORY = 8 * 2**30
# At its most a run holds a model's weights, masks and products twice, and a copy's gradients and new products.
_BYTES_PER_PARAMETER = 8 * 4


def representatives(plans: Sequence[ZooPlan]) -> list[Architecture]:
    """What a run takes: of each timm family the smallest model that has layers to prune, timm's tiny ``test_*``
    models, torchvision's classification models that fit in `MEMORY`, and all of transformers that are not left out.

    Args:
        plans: from `plan_zoo`.
    """
    smallest: dict[str, ZooPlan] = {}
    chosen = [p.architecture for p in _classification(plans) if p.layers and not is_large(p)]
    for one in plans:
        architecture = one.architecture
        if architecture.library == "transformers" and one.layers:
            chosen.append(architecture)
        if architecture.library != "timm" or not one.layers:
            continue
        if architecture.name.startswith("test_"):
            chosen.append(architecture)
        elif one.parameters < smallest.get(architecture.family, replace(one, parameters=sys.maxsize)).parameters:
            smallest[architecture.family] = one
    return sorted([*chosen, *(one.architecture for one in smallest.values())])


def too_large(plans: Sequence[ZooPlan]) -> list[str]:
    """torchvision's classification models that `representatives` leaves out for their size."""
    return sorted(p.architecture.name for p in _classification(plans) if is_large(p))


def _classification(plans: Sequence[ZooPlan]) -> list[ZooPlan]:
    if not any(p.architecture.library == "torchvision" for p in plans):
        return []
    from torchvision import models

    names = set(models.list_models(module=models))
    return [p for p in plans if p.architecture.library == "torchvision" and p.architecture.name in names]


def is_large(plan: ZooPlan) -> bool:
    """Whether a run would need more than `MEMORY`."""
    return plan.parameters * _BYTES_PER_PARAMETER > MEMORY


def run_zoo(
    chosen: Sequence[Architecture], sparsity: float = 0.96875, *, jobs: int = 1, timeout: float = 1800.0
) -> Iterator[ZooRun]:
    """Put architectures to work, each in a process of its own.

    One whose process dies, as for want of memory, gets a second try alone, after all the others.

    Args:
        chosen: from `representatives` or `sao_prune.lab.zoo.architectures`.
        sparsity: as requested, in [0, 1).
        jobs: processes at a time; each may need several GiB.
        timeout: seconds for each.

    Yields:
        One `ZooRun` an architecture, in the order of completion; failures are in it, not raised.
    """
    tasks = [RunTask(architecture, sparsity) for architecture in chosen]
    died: list[RunTask] = []
    for outcome in isolated(run_one, tasks, jobs=jobs, timeout=timeout, preload=preload(chosen)):
        if outcome.died:
            died.append(outcome.item)
        else:
            yield _ran(outcome)
    for outcome in isolated(run_one, died, timeout=timeout, preload=preload(chosen)):
        yield _ran(outcome)


def _ran(outcome: Outcome[RunTask, ZooRun]) -> ZooRun:
    return outcome.value or ZooRun(outcome.item.architecture, error=outcome.error)
