"""The optimizer and the learning rates of a training: torch's optimizers, the groups and schedules as timm has them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from ..width import rate_factors
from .spec import TrainSpec


def make_optimizer(
    model: nn.Module, spec: TrainSpec, lr: float, base: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters; biases and norms take no part in weight decay, as timm has it.

    Args:
        model: whose parameters.
        spec: of the training.
        lr: the learning rate.
        base: fan-ins of the dense network, where rates follow width and density; the schedule multiplies them then
            with each group's ``lr_scale``.
    """
    groups = _groups(model, spec.weight_decay) if base is None else _scaled_groups(model, spec.weight_decay, base)
    if spec.optimizer in ("adam", "adamw"):
        kind: Any = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, betas=spec.betas, weight_decay=0.0)  # type: ignore[no-any-return]
    return torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, nesterov=spec.optimizer == "nesterov")


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """What does not decay, then what does; a timm model names more of the former itself."""
    spared: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() <= 1 or name.endswith(".bias") or any(fnmatch(name, pattern) for pattern in spared)
            groups.setdefault(bool(decay) and not plain, []).append(parameter)
    return [{"params": groups[decays], "weight_decay": decay if decays else 0.0} for decays in sorted(groups)]


def _scaled_groups(model: nn.Module, decay: float, base: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters by weight decay and factor on the rate, those with the rate itself first."""
    factors = rate_factors(model, base)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.dim() <= 1 or name.endswith(".bias")
        groups.setdefault((factors.get(id(parameter), 1.0), 0.0 if plain else decay), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1, key))
    return [{"params": groups[key], "weight_decay": key[1], "lr_scale": key[0]} for key in order]


class RateSchedule:
    """The learning rate of every epoch; it depends on the epoch's number alone, so that nothing of it is saved.

    Args:
        optimizer: whose groups are given the rates, times their ``lr_scale`` where they have one.
        spec: of the training.
        lr: the learning rate.

    Example:
        >>> from sao_prune.lab.training import ScheduleSpec
        >>> spec = TrainSpec(epochs=4, batch_size=1, schedule=ScheduleSpec("multistep", milestones=(1, 3)))
        >>> schedule = RateSchedule(torch.optim.SGD(nn.Linear(2, 2).parameters()), spec, lr=0.5)
        >>> [round(schedule.rate(epoch), 3) for epoch in range(4)]
        [0.5, 0.05, 0.05, 0.005]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, spec: TrainSpec, lr: float) -> None:
        self._optimizer, self._schedule, self._epochs, self._lr = optimizer, spec.schedule, spec.epochs, lr

    def step(self, epoch: int) -> None:
        """Set the rates with which an epoch, counted from 0, is trained."""
        rate = self.rate(epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] if "lr_scale" in group else rate

    def rate(self, epoch: int) -> float:
        """The rate of an epoch, counted from 0."""
        schedule, lr = self._schedule, self._lr
        if epoch < schedule.warmup_epochs:
            start = lr / 100
            return start + epoch * ((lr - start) / schedule.warmup_epochs)
        if schedule.name == "multistep":
            return lr * schedule.factor ** bisect_right(schedule.milestones or (), epoch)
        if schedule.name == "cosine":
            final = schedule.final_lr
            turned = 1 + math.cos(math.pi * epoch / self._epochs) if epoch < self._epochs else 0.0
            return final + 0.5 * (lr - final) * turned
        return lr
