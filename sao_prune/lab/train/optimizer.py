"""The optimizer and the schedule of a training, both timm's."""

from __future__ import annotations

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .spec import TrainSpec


def make_optimizer(model: nn.Module, spec: TrainSpec, lr: float) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters; biases and norms take no part in weight decay, as timm has it."""
    betas = {"betas": spec.betas} if spec.optimizer in ("adam", "adamw") else {}
    return timm.optim.create_optimizer_v2(
        model, opt=spec.optimizer, lr=lr, weight_decay=spec.weight_decay, momentum=spec.momentum, **betas
    )


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
