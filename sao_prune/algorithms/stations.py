"""Running a model on calibration data with a stop at every layer, whoever calls it and however it reads its weight."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import tree_map
from ..discovery import call
from .streams import Retained, Sink

_CONVS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_NORM = inspect.signature(F.batch_norm)


@dataclass(frozen=True)
class Use:
    """One tensor of the model at work: a weight with its inputs, or the running mean of a batch norm.

    Attributes:
        key: id of the weight or of the running mean.
        inputs: one tensor for each of the weight's parts, or one for all of them.
        bias: what is added to the output, from entry ``bias_at`` on.
        conv: of a convolution ``kernel``, ``stride``, ``padding`` and ``dilation``.
        variance, scale, eps: of a batch norm the running variance, the weight and what is added to the variance.
        stream: what the output is going to be added to, laid out and scaled like the output, where that is there.
    """

    key: int
    inputs: tuple[Tensor, ...]
    bias: Tensor | None = None
    bias_at: int = 0
    conv: Mapping[str, Any] | None = None
    variance: Tensor | None = None
    scale: Tensor | None = None
    eps: float = 1e-5
    stream: Tensor | None = None


Stop = Callable[[Use], None]


class Stations(TorchFunctionMode):
    """Calls ``stop`` before a watched weight or batch norm is used, so that it may change it; inside, nothing is.

    Args:
        watched: ids of weights and of running means, each with the key that ``stop`` shall know it by.
        stop: what to call.
        sinks: of weights, by key: their residual streams are handed to ``stop``.
    """

    def __init__(self, watched: Mapping[int, int], stop: Stop, sinks: Mapping[int, Sink]) -> None:
        super().__init__()
        self._watched, self._stop, self._streams = watched, stop, Retained(sinks)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, number = kwargs or {}, self._streams.count()
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        use = find_use(func, args, kwargs)
        if use is not None and use.key in self._watched:
            self._halt(use)
        output = func(*args, **kwargs)
        self._streams.note(number, output)
        return output

    def _halt(self, use: Use) -> None:
        key = self._watched[use.key]
        self._stop(replace(use, key=key, stream=self._streams.take(key)))

    def _attention(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Attention is one call that uses up to four weights: stop before the inner ones and before the last."""
        bound = _ATTENTION.bind(*args, **kwargs)
        given = bound.arguments
        sources = tuple(given[name] for name in ("query", "key", "value"))
        for key, inputs, bias_at in _projections(given, sources):
            if key in self._watched:
                self._halt(Use(key, inputs, given.get("in_proj_bias"), bias_at))
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if id(weight) not in self._watched:
            return func(*args, **kwargs)
        given["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given["out_proj_bias"] = None
        mixed, scores = func(*bound.args, **bound.kwargs)
        self._halt(Use(id(weight), (mixed,), bias))
        return F.linear(mixed, weight, bias), scores


def _projections(given: Mapping[str, Any], sources: tuple[Tensor, ...]) -> list[tuple[int, tuple[Tensor, ...], int]]:
    """Key and inputs of each input projection, and where its bias begins in the one that they share."""
    if not given.get("use_separate_proj_weight"):
        return [(id(given["in_proj_weight"]), sources, 0)]
    weights = [given[f"{letter}_proj_weight"] for letter in "qkv"]
    width = weights[0].shape[0]
    return [(id(w), (source,), place * width) for place, (w, source) in enumerate(zip(weights, sources))]


def attention_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """What a call of `torch.nn.functional.multi_head_attention_forward` is given, by name."""
    return dict(_ATTENTION.bind(*args, **kwargs).arguments)


def find_use(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Use | None:
    """What a call uses of the model: a weight, a batch norm in eval mode, or nothing that is told apart here."""
    if func is F.linear:
        given = dict(zip(("input", "weight", "bias"), args), **kwargs)
        return Use(id(given["weight"]), (given["input"],), given.get("bias"))
    if func is torch.addmm and len(args) == 3:
        return Use(id(args[2]), (args[1],), args[0])
    if func in _CONVS:
        given, dims = dict(zip(_CONV_ARGUMENTS, args), **kwargs), _CONVS[func]
        weight = given["weight"]
        conv: dict[str, Any] = {"kernel": tuple(weight.shape[2:])}
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            conv[name] = _each(given.get(name, default), dims)
        return Use(id(weight), (given["input"],), given.get("bias"), conv=conv)
    if func is F.batch_norm:
        given = _NORM.bind(*args, **kwargs).arguments
        if given.get("running_mean") is None or given.get("running_var") is None:
            return None
        return Use(
            id(given["running_mean"]),
            (given["input"],),
            variance=given["running_var"],
            scale=given.get("weight"),
            eps=given.get("eps", 1e-5),
        )
    return None


def _each(value: Any, dims: int) -> Any:
    """One number a dimension; words such as ``"same"`` as they are."""
    if isinstance(value, str):
        return value
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


@dataclass(frozen=True)
class Visit:
    """All data in front of one layer.

    Attributes:
        uses: one for each batch, with inputs of the model that is changed on the way.
        whole: those of the model that stays whole, in the same order, or ``None`` where it takes another way.
    """

    uses: Sequence[Use]
    whole: Sequence[Use] | None


def run(
    models: tuple[nn.Module, nn.Module],
    watched: tuple[Mapping[int, int], Mapping[int, int]],
    batches: Sequence[Any],
    stop: Callable[[Visit], None],
    sinks: Mapping[int, Sink],
) -> None:
    """Run two models on all batches at once, in step: ``stop`` is called once a key, with the inputs of every batch.

    So each layer can be changed when all data have reached it and none has passed it, in a single forward pass, and
    beside them lies what they were in the model as a whole. What waits is kept: memory grows with the number of
    examples, as for two large batches. A key that comes again, as that of a tied weight does, is passed by; batches
    that take different ways wait only for those on their own way.

    Args:
        models: the one that ``stop`` changes, and the one that stays whole.
        watched: of each the ids to stop at, with the keys that both share.
        batches: the data.
        stop: called with every key of the first model.
        sinks: by key, as `Stations` takes them.
    """
    done: set[int] = set()
    # A model may write into its input, and the other one needs it as it was.
    changed, whole = (
        [_Runner(m, tree_map(_cloned, batch), w, done, sinks) for batch in batches] for m, w in zip(models, watched)
    )
    runners = changed + whole
    try:
        for runner in runners:
            runner.go()
        while waiting := [r for r in runners if r.use is not None]:
            key = waiting[0].key
            here = [r for r in waiting if r.key == key]
            uses = [r.use for r in changed if r.use is not None and r.key == key]
            besides = [w.use for c, w in zip(changed, whole) if c.key == key and w.use is not None and w.key == key]
            if uses:
                stop(Visit(uses, besides if len(besides) == len(uses) else None))
            done.add(key)
            del uses, besides
            for runner in here:
                runner.go()
    finally:
        for runner in runners:
            runner.quit()


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _Quit(BaseException):
    """Ends a runner's forward pass."""


class _Runner:
    """A forward pass in a thread of its own; one at a time runs, the others wait at their stations."""

    def __init__(
        self, model: nn.Module, batch: Any, watched: Mapping[int, int], done: set[int], sinks: Mapping[int, Sink]
    ) -> None:
        self._model, self._batch, self._watched, self._done, self._sinks = model, batch, watched, done, sinks
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._device = torch.get_default_device()
        self._error: BaseException | None = None
        self._quit = self._ended = False
        self.use: Use | None = None
        self._thread.start()

    @property
    def key(self) -> int:
        """Where it waits; -1 at the end."""
        return -1 if self.use is None else self.use.key

    def go(self) -> None:
        """Run until the next station or the end; raises what the model raised."""
        self.use = None
        self._mine.release()
        self._theirs.acquire()
        if self._error is not None:
            raise self._error

    def quit(self) -> None:
        """End the pass where it is."""
        if not self._ended:
            self._quit = True
            self._mine.release()
        self._thread.join()

    def _stop(self, use: Use) -> None:
        if use.key in self._done:
            return
        self.use = use
        self._theirs.release()
        self._mine.acquire()
        if self._quit:
            raise _Quit

    def _work(self) -> None:
        self._mine.acquire()
        try:
            if not self._quit:
                # A default device is one thread's own. The CPU is every thread's.
                default = nullcontext() if self._device.type == "cpu" else self._device
                with default, torch.no_grad(), Stations(self._watched, self._stop, self._sinks):
                    call(self._model, self._batch)
        except _Quit:
            pass
        except BaseException as error:
            self._error = error
        self._ended, self.use = True, None
        self._theirs.release()
