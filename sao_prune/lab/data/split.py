"""Parts of a labelled set in which every class has its share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two parts of a labelled set, the second with ``fraction`` of every class, both in ascending order.

    Raises:
        DataError: if ``fraction`` is not in (0, 1) or would leave a class out of either part.

    Example:
        >>> kept, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), 0.5, seed=0)
        >>> len(kept), len(held)
        (3, 3)
    """
    if not 0 < fraction < 1:
        raise DataError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    cpu_labels = labels.cpu()
    for label in cpu_labels.unique().tolist():
        members = (cpu_labels == label).nonzero().flatten()
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise DataError(
                f"class {label} has {len(members)} images: too few to hold out {fraction:.0%} of them; take more images"
            )
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten().to(labels.device), held.nonzero().flatten().to(labels.device)


def random_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two parts of a set, the second with ``fraction`` of it, both in ascending order.

    Raises:
        DataError: if ``fraction`` is not in (0, 1) or would leave either part empty.

    Example:
        >>> kept, held = random_split(torch.zeros(10, 3), 0.2, seed=0)
        >>> len(kept), len(held)
        (8, 2)
    """
    count = round(fraction * len(labels))
    if not 0 < fraction < 1 or not 0 < count < len(labels):
        raise DataError(f"holding out {fraction} of {len(labels)} sequences leaves a part empty; take more sequences")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    return order[count:].sort().values, order[:count].sort().values


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` images in ascending order, every class with its share and at least one.

    Seats are given as Webster's method gives them, after a first one for every class, so a larger subset contains
    every smaller one of the same seed.

    Raises:
        DataError: if there are fewer images than ``count``, or more classes.

    Example:
        >>> labels = torch.tensor([0] * 60 + [1] * 30)
        >>> labels[stratified_subset(labels, 9, seed=0)].bincount()
        tensor([6, 3])
    """
    cpu_labels = labels.cpu()
    classes = cpu_labels.unique()
    if not len(classes) <= count <= len(labels):
        raise DataError(
            f"a subset of {count} images cannot be had from {len(labels)} images of {len(classes)} classes: "
            f"ask for {len(classes)} to {len(labels)}"
        )
    generator = torch.Generator().manual_seed(seed)
    turn = torch.empty(len(labels), dtype=torch.float64)
    for label in classes.tolist():
        members = (cpu_labels == label).nonzero().flatten()
        turns = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        turns[0] = 0
        turn[members[torch.randperm(len(members), generator=generator)]] = turns
    return turn.argsort(stable=True)[:count].sort().values.to(labels.device)
