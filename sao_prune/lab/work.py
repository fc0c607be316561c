"""Does one trial's work: what a process, wherever it runs, turns into a result."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from torch import nn

import sao_prune

from ..files import replacing
from ..seeds import named_generator
from .cost import multiply_adds
from .data import Dataset, DataSource, DataSpec, load_dataset
from .depth import depth_spectrum
from .errors import LabError
from .methods import Gradual, Pruned, prune_network, schedule_network
from .network import initial_network
from .recipe import Configuration
from .robustness import measure
from .training import History, TensorBoardWriter, from_first, rank, train, world
from .trials import Trial
from .width import fan_ins, scale_to_density

# Each is many samples: one a step.
_SEQUENCES = 64

OnEpoch = Callable[[History], None]


@dataclass(frozen=True)
class Workplace:
    """What a worker must know beside the trial; another process can be given it.

    Attributes:
        folder: of the run; weights and checkpoints lie below it.
        threads: of torch in this process; ``None`` leaves them as they are.
        tensorboard: write event files below the folder.
    """

    folder: Path
    source: DataSource = field(default_factory=DataSource)
    device: str = "cpu"
    threads: int | None = None
    tensorboard: bool = False

    def weights(self, trial: Trial) -> Path:
        """Where the trained weights of a trial lie."""
        return self.folder / "weights" / f"{trial.key}.safetensors"

    def checkpoint(self, trial: Trial) -> Path:
        """Where a training that is not finished is saved."""
        return self.folder / "unfinished" / f"{trial.key}.pt"


class Worker:
    """Does trials one after the other, and keeps data and initial networks between them."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        if place.threads is not None:
            torch.set_num_threads(place.threads)
        self._device = torch.device(place.device)
        self._data = lru_cache(maxsize=2)(self._load)
        self._initial = lru_cache(maxsize=2)(self._draw_initial)

    def work(self, trial: Trial, on_epoch: OnEpoch | None = None) -> dict[str, Any]:
        """The record of a trial, all but its key.

        Raises:
            LabError: if the library refuses the method, or the data cannot be had.
        """
        with denormals_flushed():
            result = self._measure(trial) if trial.kind == "spectrum" else self._train(trial, on_epoch)
        return {
            "title": trial.title,
            # What a trial was called when the format was made.
            "cell": trial.content(),
            "result": result,
            "environment": _describe_environment(self._device),
        }

    def network(self, trial: Trial) -> tuple[nn.Module, Pruned]:
        """The pruned network that a trial starts from, on the CPU, so that all devices start from the same weights."""
        model, pruned, _ = self._pruned(trial)
        return model, pruned

    def _pruned(self, trial: Trial) -> tuple[nn.Module, Pruned, Gradual | None]:
        configuration, model, data = trial.configuration, self._unpruned(trial), self._data_of(trial)
        if configuration.method.is_gradual:
            steps = configuration.train.steps(len(data.train_y))
            gradual = schedule_network(model, configuration, trial.seed, data.example, steps)
            return model, gradual.left(), gradual
        chosen = examples(data, trial.seed, configuration.method.per_class) if configuration.method.needs_data else None
        measured = trial.kind == "spectrum"
        pruned = prune_network(model, configuration, trial.seed, data.example, chosen, measured)
        if configuration.train.scaling == "supar" and not configuration.method.draws_values:
            scale_to_density(model)
        if configuration.setting.network.widen:
            # As a share of the network that is not wider.
            dense = multiply_adds(self._initial(_network_key(configuration.dense), trial.seed), data.example)
            pruned = replace(pruned, dense_flops=dense.total)
        return model, pruned, None

    def _base(self, configuration: Configuration) -> dict[str, float]:
        """Fan-ins of the dense network, as wide as a recipe says it."""
        return fan_ins(self._initial(_network_key(configuration.dense), 0))

    def _unpruned(self, trial: Trial) -> nn.Module:
        """The initial network, or what a -T method's dense training has left of it."""
        model = deepcopy(self._initial(_network_key(trial.configuration), trial.seed))
        if trial.start is not None:
            model.load_state_dict(self._start_weights(trial.start))
        return model

    def _train(self, trial: Trial, on_epoch: OnEpoch | None) -> dict[str, Any]:
        setting, place = trial.configuration.setting, self.place
        assert trial.lr is not None
        model, pruned, gradual = self._pruned(trial)
        data, spec, method = self._data_of(trial), trial.configuration.train, trial.configuration.method
        checkpoint = place.checkpoint(trial)
        model = model.to(self._device)
        teacher = self._unpruned(trial).to(self._device) if spec.distill is not None else None
        with self._recorder(trial, on_epoch) as record:
            history = train(
                model,
                data,
                spec,
                trial.lr,
                trial.seed,
                record,
                augment=setting.data.augment,
                checkpoint=checkpoint,
                key=trial.key,
                pruner=None if gradual is None else gradual.pruner,
                teacher=teacher,
                base=self._base(trial.configuration) if spec.scaling == "supar" else None,
                mover=method.build(setting.gain) if method.is_moving else None,
            )
        if gradual is not None:
            pruned = gradual.left()
        if trial.leaves_weights and rank() == 0:
            _write_weights(model, place.weights(trial))
        if rank() == 0:
            checkpoint.unlink(missing_ok=True)
        return {
            **pruned.said(),
            "status": history.status,
            "accuracy": history.accuracy[-1],
            "loss": history.test_loss[-1],
            "seconds": history.seconds,
            "cpu_seconds": history.cpu_seconds,
            "steps": spec.steps(len(data.train_y)) // spec.epochs * history.epochs,
            "execution": history.execution,
            "curve": {key: getattr(history, key) for key in ("accuracy", "test_loss", "train_loss", "lr")},
            **self._robustness(trial, model, data),
            **({"memory": history.memory} if history.memory else {}),
            **({"isometry": [asdict(record) for record in history.isometry]} if history.isometry else {}),
        }

    def _robustness(self, trial: Trial, model: nn.Module, data: Dataset) -> dict[str, Any]:
        """What attacks leave of the trained network, if the recipe asks; all of them only for what is reported."""
        spec = trial.configuration.setting.robustness
        if spec is None:
            return {}
        return {"robustness": measure(model, data, spec, trial.seed, whole=trial.kind == "final")}

    @contextmanager
    def _recorder(self, trial: Trial, on_epoch: OnEpoch | None) -> Iterator[OnEpoch | None]:
        """What a training calls after every epoch: the progress display, and TensorBoard's writer if wanted."""
        if not self.place.tensorboard or rank() > 0:
            yield on_epoch
            return
        name = "".join(c if c.isalnum() or c in ".,=" else "_" for c in f"{trial.kind} {trial.title} {trial.key}")
        with TensorBoardWriter(self.place.folder / "tensorboard" / name) as writer:

            def both(history: History) -> None:
                writer.write(history)
                if on_epoch is not None:
                    on_epoch(history)

            yield both

    def _measure(self, trial: Trial) -> dict[str, Any]:
        model, pruned = self.network(trial)
        data = self._data(trial.configuration.setting.data)
        image = data.standardise(data.train_x[:1])[0]
        return {**pruned.said(), **asdict(depth_spectrum(model.to(self._device), image))}

    def _start_weights(self, trial: Trial) -> dict[str, torch.Tensor]:
        path = self.place.weights(trial)
        if world() > 1:
            if not from_first(path.is_file()):
                self._train(trial, None)
            return from_first(_read_weights(path) if rank() == 0 else {})
        if not path.is_file():
            # The file is on another machine, or was deleted: the same training gives the same weights.
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    self._train(trial, None)
        return _read_weights(path)

    def _data_of(self, trial: Trial) -> Dataset:
        spec = trial.configuration.setting.data
        data = self._data(spec)
        return data.holdout(spec.holdout) if trial.kind == "select" else data

    def _load(self, spec: DataSpec) -> Dataset:
        return load_dataset(spec, self.place.source).to(self._device)

    def _draw_initial(self, key: tuple[Any, ...], seed: int) -> nn.Module:
        network, options, data, gain, init = key
        images = self._data(data)
        return initial_network(network, dict(options), len(images.classes), images.sizes, gain, init, seed)


def examples(data: Dataset, seed: int, per_class: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images of every class, standardised, on the CPU where networks are pruned, and their labels.

    Of sequences, which have a label a step, as many as there would be of as many classes.
    """
    generator = named_generator(seed, "pruning examples")
    if data.is_sequences:
        count = min(per_class * len(data.classes), _SEQUENCES, len(data.train_y))
        x, y = data.batch(torch.randperm(len(data.train_y), generator=generator)[:count])
        return x.cpu(), y.cpu()
    labels = data.train_y.cpu()
    chosen = [
        members[torch.randperm(len(members), generator=generator)[:per_class]]
        for members in (torch.nonzero(labels == label).flatten() for label in range(len(data.classes)))
    ]
    x, y = data.batch(torch.cat(chosen))
    return x.cpu(), y.cpu()


def _network_key(configuration: Configuration) -> tuple[Any, ...]:
    setting, options = configuration.setting, configuration.network_options
    return setting.network.name, tuple(options.items()), setting.data, setting.gain, setting.init


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise LabError(f"cannot read the dense weights {path}: {error}; delete the file and run again") from error


def _write_weights(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        safetensors.torch.save_file({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, part)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Deep networks that pass no signal compute with denormal numbers, which slow a CPU down many times over.

    Threads take this setting over from the one that starts them, so it must come before the first parallel work of the
    process; where a pool of threads exists already, its threads stay slow, and nothing else changes.
    """
    before = float(torch.tensor(1e-40) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU.

    Raises:
        LabError: if the one asked for is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LabError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result was made with; not part of its key."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "sao_prune": sao_prune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}: {processor}",
        "threads": torch.get_num_threads(),
        "processes": world(),
    }


def processor_name() -> str:
    """The CPU's model, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
