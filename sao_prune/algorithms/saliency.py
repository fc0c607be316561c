"""What saliency methods share: a copy of the model to work on, data in chunks, scores of whole units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import tree_leaves, tree_map
from ..allocation import Allocation
from ..discovery import call
from ..seeds import named_generator
from .base import Method
from .draw import Draw
from .magnitude import keep_global

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Saliency(Method):
    """Base of the methods that score entries by what the whole model makes of them; one budget over all layers.

    A unit, one weight of a matrix or one whole kernel of a convolution, has the sum of its weights' scores. Everything
    is computed on a copy of the model, so that the model itself, its buffers, gradients and mode stay as they are.
    """

    layerwise: ClassVar[bool] = False

    # Options hold tensors, whose equality is no single answer.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Refused: weights alone have no saliency.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} needs the whole model: use sao_prune.apply(model, method=..)")


@dataclass(frozen=True, eq=False)
class DataSaliency(Saliency):
    """Base of the methods whose scores come from the gradient of a loss on labelled data.

    Raises:
        TypeError: if the loss is no function.
        ValueError: if inputs and targets do not belong together.
    """

    inputs: Any = field(default=None, repr=False)
    targets: Any = field(default=None, repr=False)
    loss: Loss = F.cross_entropy
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        if not callable(self.loss):
            raise TypeError(f"loss must be a function (outputs, targets) -> mean loss, got {self.loss!r}")
        if (self.inputs is None) != (self.targets is None):
            raise ValueError(f"{type(self).__name__} takes inputs and targets together")
        if self.inputs is not None:
            given, wanted = examples("inputs", self.inputs), examples("targets", self.targets)
            if given != wanted:
                raise ValueError(f"inputs hold {given} examples, targets {wanted}: give one target an example")

    def draw_for(
        self, model: nn.Module, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int
    ) -> list[Draw]:
        """Keep the units of highest score.

        Raises:
            ValueError: without data, if the model does not run on it, or if a layer gets no score.
        """
        if self.inputs is None:
            name = type(self).__name__
            raise ValueError(f"{name} needs data: method=sao_prune.{name}(inputs=x, targets=y), with one batch or more")
        copied, own = working_copy(model, allocations, weights)
        copied.train()
        with torch.enable_grad():
            scores = self._scores(model, copied, own, seed)
        units = [self._rank(unit_sums(a, s)) for a, s in zip(allocations, scores)]
        check_scores(allocations, units)
        return [Draw(a.weight, units=k) for a, k in zip(allocations, keep_global(allocations, units))]

    def _scores(self, model: nn.Module, copied: nn.Module, weights: list[nn.Parameter], seed: int) -> list[Tensor]:
        """Signed score of every single weight; ``model`` is only looked at, ``copied`` is run."""
        raise NotImplementedError

    def _rank(self, units: Tensor) -> Tensor:
        """What is compared: the highest stay."""
        return units

    def _losses(self, model: nn.Module, temperature: float = 1.0) -> Iterator[Tensor]:
        """The mean loss, in terms that are each of one chunk of the data; the graph of each is built as it is asked."""
        total = examples("inputs", self.inputs)
        pieces = -(-total // self.batch_size)
        # Chunks of nearly equal size, so that no batch norm has to do with a single example left over.
        for start, stop in pairwise(total * i // pieces for i in range(pieces + 1)):
            chunk = slice(start, stop)
            loss = self._loss(model, _part(self.inputs, chunk), _part(self.targets, chunk), temperature)
            yield loss * ((stop - start) / total)

    def _loss(self, model: nn.Module, inputs: Any, targets: Any, temperature: float) -> Tensor:
        first = next(model.parameters())
        try:
            outputs = call(model, floats_as(inputs, first.dtype))
            targets = tree_map(lambda t: t.to(first.device), targets)
            if temperature != 1:
                outputs = tree_map(lambda t: t / temperature if isinstance(t, Tensor) else t, outputs)
            loss = self.loss(outputs, targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            what = f"a chunk of {len(tree_leaves(inputs)[0])} examples"
            raise ValueError(
                f"{type(self).__name__}: no loss on {what}: {error}; check inputs, targets and batch_size, and give "
                "loss=.. where cross-entropy of the outputs is not the loss"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must give one number, the mean over its examples; got {given}")
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"{type(self).__name__}: the loss is {loss.item()} on the data given, so nothing is ranked"
            )
        return loss.reshape(())


def examples(option: str, tree: Any) -> int:
    """How many examples a tensor, or each tensor of a tuple or mapping, holds along dimension 0.

    Raises:
        TypeError: for anything but tensors.
        ValueError: if there are none, or the tensors differ.
    """
    leaves = tree_leaves(tree)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{option} must be a tensor, or a tuple or mapping of tensors, got {type(tree).__name__}")
    counts = {len(leaf) if leaf.dim() else 0 for leaf in leaves}
    if len(counts) > 1 or 0 in counts:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ValueError(f"{option} must hold equally many examples, at least one, along dimension 0; got {shapes}")
    return counts.pop()


def check_count(option: str, value: object) -> None:
    """Refuse what is no positive whole number.

    Raises:
        ValueError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{option} must be a positive whole number, got {value!r}")


def working_copy(
    model: nn.Module, allocations: Sequence[Allocation], weights: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the model to compute scores on, and its weights in the order of the allocations.

    Only these weights ask for gradients. Half-precision models are copied to single precision, for scores are products
    of small numbers; ``dtype`` asks for another.

    Raises:
        ValueError: for weights on the meta device, or if the model cannot be copied.
    """
    for allocation, weight in zip(allocations, weights):
        if weight.is_meta:
            raise ValueError(f"{allocation.weight.name} is on the meta device: plan() works there, scores need values")
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied, and scores are taken on a copy: {error}") from error
    if dtype is None and any(p.is_floating_point() and p.element_size() < 4 for p in copied.parameters()):
        dtype = torch.float32
    copied.to(dtype).zero_grad()
    copied.requires_grad_(False)
    modules = dict(copied.named_modules())
    own = [getattr(modules[a.weight.module], a.weight.tensor) for a in allocations]
    for weight in own:
        weight.requires_grad_(True)
    return copied, own


def _part(tree: Any, chunk: slice) -> Any:
    return tree_map(lambda t: t[chunk], tree)


def floats_as(tree: Any, dtype: torch.dtype) -> Any:
    """The same tree with its floating-point tensors in another precision."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


@contextmanager
def seeded(weights: Sequence[Tensor], seed: int, *, name: str = "saliency") -> Iterator[None]:
    """What is random in here, dropout say, follows ``seed``; the global generators are as before afterwards."""
    devices = sorted({w.device.index or 0 for w in weights if w.is_cuda})
    with torch.random.fork_rng(devices=devices):
        number = named_generator(seed, name).initial_seed()
        torch.default_generator.manual_seed(number)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def gradients(loss: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients; zeros where the loss does not depend on a weight."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in weights]
    found = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights)]


def unit_sums(allocation: Allocation, scores: Tensor) -> Tensor:
    """Sums of weight-wise scores over units: ``(parts, m, n)``."""
    stacked = allocation.weight.matrices(scores.detach())
    return stacked.flatten(3).sum(3) if allocation.weight.kernel else stacked


def check_scores(allocations: Sequence[Allocation], units: Sequence[Tensor]) -> None:
    """Refuse scores that rank nothing.

    Raises:
        ValueError: if scores of a layer are not finite, or all zero.
    """
    broken = [a.weight.name for a, u in zip(allocations, units) if not bool(torch.isfinite(u).all())]
    if broken:
        raise ValueError(
            f"the scores of {_listed(broken)} are not finite: the gradients overflow or the weights hold NaN"
        )
    silent = [a.weight.name for a, u in zip(allocations, units) if not bool(u.any())]
    if silent:
        raise ValueError(
            f"no gradient reaches {_listed(silent)}, so there is nothing to rank by: exclude what the model does not "
            "use; where a zero stops the gradient (timm's zero_init_last=True, a dead activation), start elsewhere"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
