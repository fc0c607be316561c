"""One training, the same for every method."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...algorithms import Method
from ...analysis import track_isometry
from ...distillation import Distiller
from ...pruner import Pruner, schedule
from ...scheduling import Moves
from ...seeds import named_generator
from ..data import Dataset
from ..errors import LabError
from .adversarial import Adversary
from .certified import training_loss
from .checkpoint import FORMAT, Checkpoint, TrainingState
from .distributed import from_first, own_share, rank, share_buffers, summed, world
from .evaluation import evaluate
from .execution import execution_form
from .history import History
from .holding import held_form
from .memory import saved_for_backward, step_memory
from .optimizer import RateSchedule, make_optimizer
from .regularization import Objective
from .spec import TrainSpec

_FEW = 8


def train(
    model: nn.Module,
    data: Dataset,
    spec: TrainSpec,
    lr: float,
    seed: int,
    on_epoch: Callable[[History], None] | None = None,
    checkpoint: Path | None = None,
    augment: tuple[str, ...] = (),
    key: str = "",
    pruner: Pruner | None = None,
    teacher: nn.Module | None = None,
    mover: Method | None = None,
    base: Mapping[str, float] | None = None,
) -> History:
    """Train ``model`` in place on the device that it and ``data`` are on.

    Batches, augmentation, mixing and dropout depend on ``seed`` and the epoch alone. A loss that is not finite ends the
    training after that epoch: the accuracy is then whatever the network has at that point. With ``spec.ema`` the model
    ends up with the averaged weights, which are the evaluated ones.

    Where `torch.distributed` is initialised, every process takes its share of each batch, and the gradient is that of
    the whole; batch normalisation sees its own share only.

    Args:
        model: dense, masked or compact; it keeps that form, however it is trained in between.
        data: images and labels.
        spec: everything else that methods have in common.
        lr: the learning rate, before the schedule.
        seed: of everything random.
        on_epoch: called after every epoch (by the first process); what it raises ends the training.
        checkpoint: a file to go on from and to write, at most every 30 s and before ``on_epoch`` ends the training.
            Delete it when the result is safe.
        augment: names of the data set's augmentations.
        key: what else tells this training from others; a checkpoint with another key is not used.
        pruner: of ``model``, to be stepped after every optimizer step; the model is then trained masked.
        teacher: what ``model`` learns from as ``spec.distill`` says; stays as it is.
        mover: a method that moves the masks that the model has, as ``spec.move_every`` and ``spec.move_until`` say.
        base: fan-ins of the dense network (`sao_prune.lab.width.fan_ins`), where rates follow width and density.

    Returns:
        What happened; the same on every process.

    Raises:
        LabError: if the model cannot learn from its teacher, or nothing could ever move.

    Example:
        >>> import torch, sao_prune
        >>> from sao_prune.lab.data import load_dataset
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))
        >>> history = train(net, load_dataset("digits"), TrainSpec(epochs=1, batch_size=64), lr=0.01, seed=0)
        >>> history.status, history.execution, history.accuracy[0] > 0.5
        ('ok', 'dense', True)
    """
    few = data.standardise(data.train_x[:_FEW])
    with (
        _own_random_state(data.device),
        execution_form(model, _execution(spec, pruner), few) as form,
        held_form(model, spec.hold) as held,
        _distiller(model, teacher, spec) as distiller,
    ):
        execution = form + held
        trainer = _Trainer(model, data, spec, seed, augment, distiller)
        if mover is not None:
            pruner = _moving(model, mover, spec, len(data.train_y), seed)
        optimizer = _optimizer(model, spec, lr, base)
        rates = RateSchedule(optimizer, spec, lr)
        average = _average(model, spec)
        state = TrainingState(model, optimizer, average, History(execution=execution), pruner)
        file = Checkpoint(checkpoint, _identity(spec, lr, seed, execution, augment, key, data, mover))
        file.resume(state)
        history = state.history
        isometry = _isometry(model, few, spec, history)
        while history.epochs < spec.epochs and history.status == "ok":
            rates.step(history.epochs)
            loss = trainer.epoch(state)
            accuracy, test_loss = evaluate(model if average is None else average.module, data)
            history.lr.append(optimizer.param_groups[0]["lr"])
            history.train_loss.append(loss)
            history.test_loss.append(test_loss)
            history.accuracy.append(accuracy)
            history.status = "ok" if math.isfinite(loss) else "diverged"
            isometry()
            file.save(state)
            if on_epoch is not None and rank() == 0:
                try:
                    on_epoch(history)
                except BaseException:
                    file.save(state, now=True)
                    raise
        if average is not None:
            model.load_state_dict(average.module.state_dict())
    return history


@dataclass
class _Trainer:
    """The training steps of an epoch."""

    model: nn.Module
    data: Dataset
    spec: TrainSpec
    seed: int
    augment: tuple[str, ...]
    distiller: Distiller | None = None

    def __post_init__(self) -> None:
        runner = self.model
        if self.spec.channels_last:
            runner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world() > 1:
            runner = DistributedDataParallel(runner)
        self._runner = torch.compile(runner) if self.spec.compile else runner
        self._objective = Objective(self.spec, len(self.data.classes))
        attacker = self.spec.adversarial
        self._adversary = None if attacker is None else Adversary(attacker, self.model, self.data)
        self._loss = training_loss(self.spec, self.model, self.data, self._objective)
        self._device = self.data.device

    def epoch(self, state: TrainingState) -> float:
        """Train one epoch; adds its time to the history and returns the mean loss."""
        history, start, cpu = state.history, time.perf_counter(), time.process_time()
        self.model.train()
        torch.manual_seed(named_generator(self.seed, "dropout", history.epochs, rank()).initial_seed())
        total = torch.zeros((), device=self._device)
        for step, (x, target, count) in enumerate(self._batches(history.epochs)):
            is_first = not history.epochs and not step
            total += (self._first_step if is_first else self._step)(state, x, target, count)
            pruned = None if state.pruner is None else state.pruner.step(state.optimizer)
            if state.average is not None:
                if pruned is not None:
                    _share_masks(state.average.module, self.model)
                state.average.update(self.model, step=history.epochs * self._steps + step + 1)
        # Read once, at the end, so that a GPU need not wait after every step.
        loss, seconds, cpu = summed(
            float(total), time.perf_counter() - start, time.process_time() - cpu, device=self._device
        )
        history.seconds += seconds / world()
        history.cpu_seconds += cpu
        for module in (self.model, state.average):
            if module is not None:
                share_buffers(module)
        return loss / len(self.data.train_y)

    @property
    def _steps(self) -> int:
        return math.ceil(len(self.data.train_y) / self.spec.batch_size)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Images and targets of this process, and how many all of them have together.

        Every process makes the whole batch, so that what is drawn for an image does not depend on their number.
        """
        order, augmentation, mixing, starts = (
            named_generator(self.seed, name, epoch) for name in ("batch order", "augmentation", "mixing", "adversary")
        )
        for batch in torch.randperm(len(self.data.train_y), generator=order).split(self.spec.batch_size):
            x, y = self.data.batch(batch, self.augment, augmentation)
            x, target = self._objective.mix(x, y, mixing)
            noise = None if self._adversary is None else torch.rand(x.shape, generator=starts)
            if rank() < len(batch):
                x, target = own_share(x), own_share(target)
                yield self._attacked(x, target, noise), target, len(batch)
            else:
                # Nothing is left for this process, but the others wait for its gradient: that of no label is zero.
                yield x[:1], torch.zeros(1, len(self.data.classes), *y.shape[1:], device=self._device), len(batch)

    def _attacked(self, x: Tensor, target: Tensor, noise: Tensor | None) -> Tensor:
        """The images as an attacker would have them, if the training has one."""
        if self._adversary is None or noise is None:
            return x
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.spec.amp == "bf16"):
            return self._adversary(x, lambda logits: self._objective.loss(logits, target), own_share(noise))

    def _first_step(self, state: TrainingState, x: Tensor, target: Tensor, count: int) -> Tensor:
        """The first step of a training, and what it holds in memory."""
        if self.spec.compile:
            # Hooks on what is saved would be compiled in, and everything again without them.
            return self._step(state, x, target, count)
        with saved_for_backward() as saved:
            loss = self._step(state, x, target, count)
        averages = [] if state.average is None else [state.average.module]
        state.history.memory = from_first(step_memory([self.model, *averages], state.optimizer, saved))
        return loss

    def _step(self, state: TrainingState, x: Tensor, target: Tensor, count: int) -> Tensor:
        """One step; returns the loss summed over this process's images."""
        if self.spec.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.spec.amp == "bf16"):
            logits = self._runner(x)
            loss = self._loss(logits, target)
            if self.distiller is not None:
                own = len(x) if rank() < count else 0
                loss = self.distiller.loss(x, logits, loss / max(own, 1)) * own
        state.optimizer.zero_grad()
        # Processes' gradients are averaged: times their number makes that the gradient of the whole batch's mean.
        (loss * (world() / count)).backward()
        if self.spec.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        state.optimizer.step()
        return loss.detach()


def _execution(spec: TrainSpec, pruner: Pruner | None) -> str:
    """The form to train in; what is held, or whose norms a loss asks for, stays masked."""
    return "masked" if pruner is not None or spec.hold or spec.loss.is_certified else spec.execution


def _optimizer(model: nn.Module, spec: TrainSpec, lr: float, base: Mapping[str, float] | None) -> torch.optim.Optimizer:
    try:
        return make_optimizer(model, spec, lr, base)
    except ValueError as error:
        raise LabError(f"scaling {spec.scaling}: {error}; execution: masked keeps the names of all weights") from error


def _average(model: nn.Module, spec: TrainSpec) -> Any:
    """timm's moving average of a model, if there is to be one."""
    if not spec.ema:
        return None
    # Importing timm takes longer than many a training that does without.
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, spec.ema, use_warmup=True)


def _moving(model: nn.Module, mover: Method, spec: TrainSpec, images: int, seed: int) -> Pruner:
    try:
        over = Moves(spec.steps(images), spec.move_every, spec.move_until)
        return schedule(model, mover, over=over, seed=seed)
    except ValueError as error:
        raise LabError(f"{mover.name}: {error}") from error


@contextmanager
def _distiller(model: nn.Module, teacher: nn.Module | None, spec: TrainSpec) -> Iterator[Distiller | None]:
    """What adds the teacher's part to the loss, if there is a teacher."""
    if teacher is None or spec.distill is None:
        yield None
        return
    try:
        distiller = Distiller(model, teacher, spec.distill.options())
    except ValueError as error:
        raise LabError(f"distill: {error}") from error
    with distiller:
        yield distiller


def _share_masks(average: nn.Module, model: nn.Module) -> None:
    """Give an average the masks of the model: averaged ones would be neither there nor away."""
    with torch.no_grad():
        masks = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}
        for name, own in average.named_buffers():
            if name in masks:
                own.copy_(masks[name])


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Dropout draws from the global generators: whatever they are set to inside, they are put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _isometry(model: nn.Module, x: Tensor, spec: TrainSpec, history: History) -> Callable[[], None]:
    """To be called after every epoch; measures the untrained network at once."""
    if not spec.isometry_every:
        return lambda: None
    tracker = track_isometry(model, x, every=spec.isometry_every)
    tracker.records = history.isometry
    tracker.calls = history.epochs + (1 if history.isometry else 0)
    if not history.isometry:
        tracker()
    return tracker


def _identity(
    spec: TrainSpec,
    lr: float,
    seed: int,
    execution: str,
    augment: tuple[str, ...],
    key: str,
    data: Dataset,
    mover: Method | None,
) -> str:
    sizes = [data.name, len(data.train_y), len(data.test_y)]
    moving = [] if mover is None else [repr(mover)]
    return json.dumps([FORMAT, asdict(spec), lr, seed, execution, augment, key, sizes, world(), *moving])
