"""The optimizer and the schedule of a training, both timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
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
        base: fan-ins of the dense network, where rates follow width and density; the scheduler multiplies them then
            with each group's ``lr_scale``.
    """
    betas = {"betas": spec.betas} if spec.optimizer in ("adam", "adamw") else {}
    parameters: Any = model if base is None else _scaled_groups(model, spec.weight_decay, base)
    decay = spec.weight_decay if base is None else 0.0
    return timm.optim.create_optimizer_v2(
        parameters, opt=spec.optimizer, lr=lr, weight_decay=decay, momentum=spec.momentum, **betas
    )


def _scaled_groups(model: nn.Module, decay: float, base: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters by weight decay and factor on the rate, those with the rate itself first."""
    factors = rate_factors(model, base)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.dim() <= 1 or name.endswith(".bias")
        groups.setdefault((factors.get(id(parameter), 1.0), 0.0 if plain else decay), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1, key))
    return [{"params": groups[key], "weight_decay": key[1], "lr_scale": key[0]} for key in order]


def make_scheduler(optimizer: torch.optim.Optimizer, spec: TrainSpec, lr: float) -> Scheduler:
    """The schedule; ``scheduler.step(e)`` sets the rates with which epoch ``e``, counted from 0, is trained.

    The rate of an epoch depends on its number alone, so a resumed training needs no state of the schedule.
    """
    schedule = spec.schedule
    # Older versions of timm have no constant schedule with a warm-up: steps that change nothing are one.
    constant = schedule.name == "constant"
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched="step" if constant else schedule.name,
        num_epochs=spec.epochs,
        # timm counts one epoch ahead of torch's MultiStepLR, whose meaning recipes and papers have.
        decay_milestones=[milestone + 1 for milestone in schedule.milestones or ()],
        decay_rate=1.0 if constant else schedule.factor,
        min_lr=schedule.final_lr,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=lr / 100,
    )
    return scheduler
