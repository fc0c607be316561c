"""The order in which a model uses its parameters, observed in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .._torch import eagerly, tree_leaves, tree_map, version


class Use(NamedTuple):
    """The first use of a tensor: its id, and whether as the table of an embedding."""

    key: int
    embedding: bool


class _UseRecorder(TorchFunctionMode):
    """Notes the first use of each watched tensor in any torch function, whoever calls it.

    A tensor that is both, a layer's weight and tied to an embedding, is noted once in either role. Of a pruned weight
    what counts is the use of its product with the mask, which a model may compute for all its layers beforehand.
    """

    def __init__(self, layers: Iterable[Tensor], embeddings: Iterable[Tensor], model: nn.Module) -> None:
        super().__init__()
        known = (_behind(value) for module in model.modules() for value in vars(module).values())
        self._masked = {id(parameter) for parameter in known if parameter is not None}
        self._layers = {id(t) for t in layers}
        self._embeddings = {id(t) for t in embeddings}
        self._only_embeddings = self._embeddings - self._layers
        self.uses: list[Use] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__":
            for leaf in tree_leaves((args, kwargs)):
                behind = _behind(leaf)
                if behind is None and id(leaf) in self._masked:
                    continue
                leaf = leaf if behind is None else behind
                looked_up = name.startswith("embedding") or id(leaf) in self._only_embeddings
                watched = self._embeddings if looked_up else self._layers
                if id(leaf) in watched:
                    watched.discard(id(leaf))
                    self.uses.append(Use(id(leaf), looked_up))
        return func(*args, **(kwargs or {}))


def _behind(value: Any) -> nn.Parameter | None:
    """The parameter that a masked weight is computed from (`sao_prune.prune`); ``None`` of anything else."""
    return getattr(value, "stands_for", None) if isinstance(value, Tensor) else None


def call(model: nn.Module, example_input: Any) -> Any:
    """Run a model on an example input, moved to its device.

    Args:
        model: any module.
        example_input: a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Returns:
        What the model returns.

    Example:
        >>> call(nn.Identity(), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    moved = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, example_input)
    if isinstance(moved, Mapping):
        return model(**moved)
    return model(*moved) if isinstance(moved, (tuple, list)) else model(moved)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module has its own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """What a run writes to buffers is undone; lazy ones, which have no values yet, are left to it."""
    kept = [
        (module, name, buffer, version(buffer), buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for module, name, buffer, before, copy in kept:
            module._buffers[name] = buffer
            if before is None or version(buffer) != before:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(copy)


@contextmanager
def looking(model: nn.Module, devices: Sequence[int] = ()) -> Iterator[None]:
    """For a run that only looks: in eval mode, as it is written, without gradients; all that it changes is restored.

    Args:
        model: that is to run.
        devices: CUDA devices whose generators are to stay as they are.
    """
    generators = torch.random.fork_rng(devices=list(devices))
    with evaluating(model), keeping_buffers(model), eagerly(), generators, torch.no_grad():
        yield


def copied(example_input: Any) -> Any:
    """The same nest with tensors of its own, as a model may write to what it is given; one tensor in several places
    stays one."""
    copies: dict[int, Tensor] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), value.clone()) if isinstance(value, Tensor) else value

    return tree_map(own, example_input)


def run(model: nn.Module, example_input: Any) -> Any:
    """`call`, with an error that says that the input is at fault.

    Raises:
        ValueError: if the model fails on the example input.
    """
    try:
        return call(model, example_input)
    except Exception as error:
        raise ValueError(f"the model does not run on the example input: {error}") from error


def first_uses(
    model: nn.Module, parameters: Sequence[nn.Parameter], embeddings: Sequence[nn.Parameter], example_input: Any
) -> list[Use]:
    """The first uses of layers' weights and of embeddings, in their order; unused ones are missing.

    Runs the model once in eval mode without gradients and restores every module's mode and buffers.

    Raises:
        ValueError: if the model fails on the example input.
    """
    devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
    recorder, inputs = _UseRecorder(parameters, embeddings, model), copied(example_input)
    with looking(model, devices), recorder:
        run(model, inputs)
    return recorder.uses
