"""One pruned model at work: train, copy, compact, bake, save and load it."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import tree_leaves
from ...algorithms.saliency import floats_as
from ...blocks import compact
from ...checkpoint import load, save
from ...discovery import call
from ...model import apply, remove
from ...reporting import Report
from ..isolate import one_line
from .architecture import Architecture
from .families import small_inputs
from .images import BATCH, smallest_input
from .readers import Readers


class BrokenLawError(AssertionError):
    """A pruned model of the zoo does not do what it must."""


@dataclass(frozen=True)
class RunTask:
    """One architecture to put to work, at a sparsity."""

    architecture: Architecture
    sparsity: float


@dataclass(frozen=True)
class ZooRun:
    """What became of one architecture at work.

    Attributes:
        architecture: which one.
        parameters: parameters of the whole model.
        layers: layers that were pruned.
        sparsity: of them.
        image: shape of the input, batch included.
        unused: pruned layers that a training step gives no gradient, dense or pruned.
        readers: torch functions that read masked weights.
        seconds: wall-clock time.
        peak: most resident memory of the process in bytes, interpreter and libraries included.
        error: the stage that failed and why; ``None`` if all went well.
    """

    architecture: Architecture
    parameters: int = 0
    layers: int = 0
    sparsity: float = 0.0
    image: tuple[int, ...] = ()
    unused: int = 0
    readers: tuple[str, ...] = ()
    seconds: float = 0.0
    peak: int = 0
    error: str | None = None


def run_one(task: RunTask) -> ZooRun:
    """Put one architecture to work in this process, stage by stage, and tell which stage fails."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    trial = Trial(task)
    stages: tuple[Callable[[], None], ...] = (
        trial.build, trial.train_dense, trial.prune, trial.train, trial.copy, trial.compact, trial.bake, trial.load,
    )  # fmt: skip
    error = None
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trial.folder = folder
        for stage in stages:
            try:
                stage()
            except Exception as failure:
                error = f"{stage.__name__}: {one_line(failure)}"
                break
    result = replace(trial.result, seconds=time.perf_counter() - start, peak=_peak(), error=error)
    return result


@dataclass
class Trial:
    """The stages of one architecture's run; each raises if the model does not do what it must."""

    task: RunTask
    result: ZooRun = field(init=False)
    options: dict[str, Any] = field(default_factory=dict)
    folder: str = ""

    def __post_init__(self) -> None:
        self.result = ZooRun(self.task.architecture)

    def build(self) -> None:
        """Build the model, and the smallest images or tokens that it takes."""
        if self.task.architecture.library == "transformers":
            self.model = self.task.architecture.build()
            self.inputs: Any = small_inputs(self.model)
        else:
            self.options, size = smallest_input(self.task.architecture)
            self.model = self.task.architecture.build(**self.options)
            self.inputs = torch.randn(BATCH, *size)
        parameters = sum(p.numel() for p in self.model.parameters())
        shape = tuple(next(x for x in tree_leaves(self.inputs) if isinstance(x, Tensor)).shape)
        self.result = replace(self.result, parameters=parameters, image=shape)

    def train_dense(self) -> None:
        """One step without an update: which weights get a gradient."""
        self._forward_backward(self.model)
        self.trained = {name for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)

    def prune(self) -> None:
        """Apply, in place."""
        self.report: Report = apply(self.model, sparsity=self.task.sparsity, seed=0)
        self.result = replace(self.result, layers=len(self.report.pruned), sparsity=self.report.sparsity)

    def train(self) -> None:
        """Two steps with weight decay; zeros stay, the same weights are trained, and nothing transforms a weight.

        Raises:
            BrokenLawError: naming what differs.
        """
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        readers = Readers()
        for step in range(2):
            optimizer.zero_grad(set_to_none=True)
            with readers:
                self._forward_backward(self.model)
            if step == 0:
                before = {name: _fingerprint(p) for name, p in self._originals()}
                optimizer.step()
                unchanged = [
                    name for name, p in self._originals() if p.grad is not None and before[name] == _fingerprint(p)
                ]
                if unchanged:
                    raise BrokenLawError(f"the optimizer step does not change {_some(unchanged)}")
        self._check_masks()
        now = {n.removesuffix("_orig") for n, p in self.model.named_parameters() if p.grad is not None}
        if now != self.trained:
            raise BrokenLawError(f"gradients of the dense and the pruned model differ: {_some(now ^ self.trained)}")
        unused = sum(layer.name not in now for layer in self.report.pruned)
        self.result = replace(self.result, unused=unused, readers=tuple(sorted(readers.names)))
        others = readers.others(experts=self.task.architecture.library == "transformers")
        if others:
            raise BrokenLawError(f"masked weights are read by {_some(others)}")
        optimizer.zero_grad(set_to_none=True)
        self.outputs = self._outputs(self.model)

    def copy(self) -> None:
        """A deep copy gives equal outputs, and trains without touching the original."""
        twin = copy.deepcopy(self.model)
        self._check_equal(twin, "deepcopy")
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
        self._forward_backward(twin)
        optimizer.step()
        self._check_equal(self.model, "the original, after its copy was trained")

    def compact(self) -> None:
        """A compact copy, whose layers compute the norms and activations behind them, gives equal outputs, and equal
        gradients to what it shares with the original.

        Raises:
            BrokenLawError: naming what differs.
        """
        twin = copy.deepcopy(self.model)
        try:
            compact(copy.deepcopy(twin))
        except ValueError:
            return  # it says of every layer why it stays as it is
        try:
            compact(twin, example_input=self.inputs)
        except ValueError as error:
            raise BrokenLawError(f"compact: {error}") from error
        try:
            self._check_equal(twin, "compact")
        except BrokenLawError:
            # A network may magnify what single precision rounds off; it is no excuse for more than that.
            self._check_equal_in_double(twin, "compact")
        ours, theirs = self._gradients(self.model), self._gradients(twin)
        wrong = _far(theirs, ours, ours)
        if wrong:
            # Nor is it one for more than what single precision makes of the original's.
            exact = self._gradients(copy.deepcopy(self.model).double(), torch.float64)
            double = self._gradients(copy.deepcopy(twin).double(), torch.float64)
            wrong = _far({name: theirs[name] for name in wrong}, exact, ours) + _far(double, exact, exact, 1e-6)
        if wrong:
            raise BrokenLawError(f"compact: other gradients of {_some(wrong)}")

    def _gradients(self, model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        self._forward_backward(model, training=False, dtype=dtype)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    def bake(self) -> None:
        """Remove leaves plain weights with the zeros in place, and equal outputs; saved before and after.

        Raises:
            BrokenLawError: naming what differs.
        """
        save(self.model, self._file("pruned"))
        masks = {name: getattr(module, f"{tensor}_mask") for name, module, tensor in self._pruned()}
        remove(self.model)
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        revived = [name for name, mask in masks.items() if _reaches_beyond(weights[name], mask)]
        if revived:
            raise BrokenLawError(f"remove leaves non-zeros in {_some(revived)}")
        self._check_equal(self.model, "remove")
        save(self.model, self._file("baked"))

    def load(self) -> None:
        """The baked file makes a fresh dense model equal, and the pruned one makes it equal and pruned."""
        del self.model
        fresh = self.task.architecture.build(**self.options)
        for kind in ("baked", "pruned"):
            load(fresh, self._file(kind))
            self._check_equal(fresh, f"the {kind} model, saved and loaded")

    def _file(self, kind: str) -> str:
        return os.path.join(self.folder, f"{kind}.safetensors")

    def _forward_backward(self, model: nn.Module, training: bool = True, dtype: torch.dtype | None = None) -> None:
        model.train(training)
        inputs = self.inputs if dtype is None else floats_as(self.inputs, dtype)
        outputs = _tensors(call(model, inputs))
        loss = torch.stack(
            [(out.to(dtype or torch.float32) - 1).square().mean() for out in outputs if out.requires_grad]
        ).sum()
        if not bool(loss.isfinite()):
            raise BrokenLawError("the loss is not finite")
        loss.backward()

    @torch.no_grad()
    def _outputs(self, model: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
        inputs = self.inputs if dtype is None else floats_as(self.inputs, dtype)
        outputs = _tensors(call(model.eval(), inputs))
        if not all(bool(out.isfinite().all()) for out in outputs):
            raise BrokenLawError("outputs are not finite")
        return outputs

    def _check_equal(self, model: nn.Module, what: str) -> None:
        _check_close(self.outputs, self._outputs(model), what)

    def _check_equal_in_double(self, model: nn.Module, what: str) -> None:
        ours, theirs = (self._outputs(copy.deepcopy(m).double(), torch.float64) for m in (self.model, model))
        _check_close(ours, theirs, f"{what}, in double precision")

    def _pruned(self) -> Iterator[tuple[str, nn.Module, str]]:
        for layer in self.report.pruned:
            path, _, tensor = layer.name.rpartition(".")
            yield layer.name, self.model.get_submodule(path), tensor

    def _originals(self) -> Iterator[tuple[str, Tensor]]:
        for name, module, tensor in self._pruned():
            yield name, getattr(module, f"{tensor}_orig")

    def _check_masks(self) -> None:
        for (name, module, tensor), layer in zip(self._pruned(), self.report.pruned, strict=True):
            mask, weight = getattr(module, f"{tensor}_mask"), getattr(module, tensor)
            if int(mask.sum()) != layer.nnz:
                raise BrokenLawError(f"{name}: the mask keeps {int(mask.sum())} weights, the report says {layer.nnz}")
            if _reaches_beyond(weight, mask):
                raise BrokenLawError(f"{name}: masked entries are not zero in the weight that is used")


def _check_close(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    for our, their in zip(ours, theirs, strict=True):
        error = float((our - their).abs().max())
        if not error <= 1e-5 * max(1.0, float(our.abs().max())):
            raise BrokenLawError(f"{what}: outputs differ by {error:.3g}")


def _far(
    found: dict[str, Tensor], wanted: dict[str, Tensor], single: dict[str, Tensor], share: float = 0.05
) -> list[str]:
    """The gradients that lie off by more than a share of their norm and twice as much as those in single precision."""
    typical = max(float(grad.norm()) for grad in wanted.values())
    off = {
        name: (float((grad.to(wanted[name]) - wanted[name]).norm()), float((single[name] - wanted[name]).norm()))
        for name, grad in found.items()
        if name in wanted and name in single
    }
    slack = {n: share * (float(wanted[n].norm()) + typical / 500) + 2 * same for n, (_, same) in off.items()}
    return [n for n, (own, _) in off.items() if own > slack[n]]


def _reaches_beyond(weight: Tensor, mask: Tensor) -> bool:
    """Whether the weight has non-zeros where the mask has zeros."""
    return bool((weight.detach() != 0).logical_and_(mask == 0).any())


def _fingerprint(parameter: Tensor) -> float:
    return float(parameter.detach().norm(1))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _some(names: Any, limit: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _peak() -> int:
    """Most resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
