"""Running a model on calibration data with a stop at every layer, whoever calls it and however it reads its weight."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import tree_map
from ..discovery import call
from .recurrence import recurrent, recurrent_uses
from .streams import Retained, Sink
from .uses import Stack, Use, attention_arguments, find_use, projections, stack_uses

Stop = Callable[[Use], bool]


@dataclass(frozen=True)
class Watched:
    """What to stop at in a model.

    Attributes:
        keys: ids of weights and of running means, each with the key that it shall be known by.
        stacks: by the ids of weights, whose matrices have keys of their own.
    """

    keys: Mapping[int, int]
    stacks: Mapping[int, Stack] = field(default_factory=dict)


class Stations(TorchFunctionMode):
    """Calls ``stop`` before a watched weight or batch norm is used, so that it may change it; inside, nothing is.

    Where a call makes something of a weight in a way that is not told apart, the weight comes without inputs.

    Args:
        watched: what to stop at.
        stop: what to call; tells whether it has not been there before.
        sinks: of weights, by key: their residual streams are handed to ``stop``.
    """

    def __init__(self, watched: Watched, stop: Stop, sinks: Mapping[int, Sink]) -> None:
        super().__init__()
        self._watched, self._stop, self._streams = watched.keys, stop, Retained(sinks)
        self._stacks = watched.stacks

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, number = kwargs or {}, self._streams.count()
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        known = list(self._uses(func, args, kwargs))
        output = func(*args, **kwargs)
        if not known and self._touched(func, args, kwargs, output):
            output = func(*args, **kwargs)
        self._streams.note(number, output)
        return output

    def _uses(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Use]:
        """Stop at what a call uses."""
        use = find_use(func, args, kwargs)
        if use is not None and use.key in self._watched:
            self._halt(use)
            yield use
        elif any(id(weight) in self._watched for weight in recurrent(func, args)):
            for use in recurrent_uses(func, args):
                if use.key in self._watched:
                    self._halt(use)
                yield use
        elif self._stacks:
            for use in stack_uses(func, args, kwargs, self._stacks):
                self._stop(use)
                yield use

    def _touched(self, func: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> bool:
        """Stop at weights of which a call has made something; tells whether it is to be made anew."""
        name, anew = getattr(func, "__name__", ""), False
        made = output if isinstance(output, tuple) else (output,)
        if not any(isinstance(y, Tensor) for y in made) or name.endswith(("_like", "_as")) or name.startswith("new_"):
            return False
        if name == "to":
            args, kwargs = args[:1], {}
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor) or x is output:
                continue
            owner = x if x._base is None else x._base
            # Views and conversions to what it is already are still the weight.
            if isinstance(output, Tensor) and output.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr():
                continue
            if id(owner) in self._watched:
                anew |= self._halt(Use(id(owner), ()))
            elif id(owner) in self._stacks:
                anew |= self._stop(Use(id(owner), ()))
        return anew and not any(x is output for x in args)

    def _halt(self, use: Use) -> bool:
        key = self._watched[use.key]
        return self._stop(replace(use, key=key, stream=self._streams.take(key)))

    def _attention(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Attention is one call that uses up to four weights: stop before the inner ones and before the last."""
        given = attention_arguments(args, kwargs)
        sources = tuple(given[name] for name in ("query", "key", "value"))
        for key, inputs, bias_at in projections(given, sources):
            if key in self._watched:
                self._halt(Use(key, inputs, given.get("in_proj_bias"), bias_at))
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if id(weight) not in self._watched:
            return func(*args, **kwargs)
        given["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given["out_proj_bias"] = None
        mixed, scores = func(**given)
        self._halt(Use(id(weight), (mixed,), bias))
        return F.linear(mixed, weight, bias), scores


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
    watched: tuple[Watched, Watched],
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
        watched: of each what to stop at, with keys that both share.
        batches: the data.
        stop: called with every key of the first model.
        sinks: by key, as `Stations` takes them.
    """
    done: set[int] = set()
    # A model may write into its input, and the other one needs it as it was.
    changed, whole = (
        [_Runner(m, tree_map(_cloned, batch), w, done, sinks) for batch in batches] for m, w in zip(models, watched)
    )
    runners, ways = changed + whole, _Ways(models[1], watched[1], batches)
    try:
        for runner in runners:
            runner.go()
        while waiting := [r for r in runners if r.use is not None]:
            key = waiting[0].key
            for number, (runner, other) in enumerate(zip(changed, whole)):
                if runner.key == key:
                    ways.catch_up(number, other, key)
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


class _Ways:
    """The stations of the model that stays whole, batch by batch, known where it takes another way than the other one.

    Where that one passes by what this one stops at, an expert that gets no example say, this one has to go on.
    """

    def __init__(self, model: nn.Module, watched: Watched, batches: Sequence[Any]) -> None:
        self._model, self._watched, self._batches = model, watched, batches
        self._found: dict[int, dict[int, int]] = {}

    def catch_up(self, number: int, runner: _Runner, key: int) -> None:
        """Take a runner to a station, if that still is ahead of it."""
        if runner.key in (key, -1):
            return
        if number not in self._found:
            self._found[number] = self._way(self._batches[number])
        place = self._found[number]
        while runner.use is not None and place.get(runner.key, len(place)) < place.get(key, -1):
            runner.go()

    def _way(self, batch: Any) -> dict[int, int]:
        """Places of the stations in their order, from a run of a copy: the model itself is in the middle of one."""
        copied, place = copy.deepcopy(self._model), dict[int, int]()
        pairs = zip(*([*m.named_parameters(), *m.named_buffers()] for m in (self._model, copied)))
        keys = {id(t): self._watched.keys[id(s)] for (_, s), (_, t) in pairs if id(s) in self._watched.keys}

        def note(use: Use) -> bool:
            place.setdefault(use.key, len(place))
            return False

        with torch.no_grad(), Stations(Watched(keys), note, {}):
            call(copied, tree_map(_cloned, batch))
        return place


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _Quit(BaseException):
    """Ends a runner's forward pass."""


class _Runner:
    """A forward pass in a thread of its own; one at a time runs, the others wait at their stations."""

    def __init__(
        self, model: nn.Module, batch: Any, watched: Watched, done: set[int], sinks: Mapping[int, Sink]
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

    def _stop(self, use: Use) -> bool:
        if use.key in self._done:
            return False
        self.use = use
        self._theirs.release()
        self._mine.acquire()
        if self._quit:
            raise _Quit
        return True

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
