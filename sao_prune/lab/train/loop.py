"""One training, the same for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import timm.optim
import timm.scheduler
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...seeds import named_generator
from ..data import Dataset
from .spec import TrainSpec

_EVAL_BATCH = 4096


@dataclass
class History:
    """What a training left behind, one entry an epoch.

    Attributes:
        status: ``ok``, or ``diverged`` when the training loss stopped being a finite number.
        train_loss, test_loss: mean cross-entropy in nats.
        accuracy: correct answers on the test set, a fraction.
        seconds: wall clock of the training steps, without the evaluations.
    """

    status: str = "ok"
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: nn.Module,
    data: Dataset,
    spec: TrainSpec,
    lr: float,
    seed: int,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train ``model`` in place on the device that it and ``data`` are on.

    The order of the batches depends on ``seed`` alone. A loss that is not finite ends the training after that epoch:
    the accuracy is then whatever the network has at that point.
    """
    optimizer = timm.optim.create_optimizer_v2(
        model, opt=spec.optimizer, lr=lr, weight_decay=spec.weight_decay, momentum=spec.momentum
    )
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=spec.schedule.name,
        num_epochs=spec.epochs,
        # timm counts one epoch ahead of torch's MultiStepLR, whose meaning recipes and papers have.
        decay_milestones=[milestone + 1 for milestone in spec.schedule.milestones or ()],
        decay_rate=spec.schedule.factor,
        warmup_epochs=spec.schedule.warmup_epochs,
        warmup_lr=lr / 100,
    )
    order = named_generator(seed, "batch order")
    history = History()
    for epoch in range(spec.epochs):
        start = time.perf_counter()
        loss = _train_epoch(model, data, optimizer, spec.batch_size, order)
        history.seconds += time.perf_counter() - start
        scheduler.step(epoch + 1)
        accuracy, test_loss = evaluate(model, data.test_x, data.test_y)
        history.train_loss.append(loss)
        history.accuracy.append(accuracy)
        history.test_loss.append(test_loss)
        if not math.isfinite(loss):
            history.status = "diverged"
        if on_epoch is not None:
            on_epoch(history)
        if history.status != "ok":
            break
    return history


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy (a fraction) and mean cross-entropy of ``model`` on images ``x`` with labels ``y``."""
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in zip(x.split(_EVAL_BATCH), y.split(_EVAL_BATCH)):
            logits = model(images)
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(y), loss / len(y)


def _train_epoch(
    model: nn.Module, data: Dataset, optimizer: torch.optim.Optimizer, batch_size: int, order: torch.Generator
) -> float:
    """One pass; the mean loss, read once at the end so that a GPU need not wait after every step."""
    model.train()
    total = torch.zeros((), device=data.train_x.device)
    for batch in torch.randperm(len(data.train_y), generator=order).split(batch_size):
        chosen = batch.to(data.train_x.device)
        loss = F.cross_entropy(model(data.train_x[chosen]), data.train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    return float(total) / len(data.train_y)
