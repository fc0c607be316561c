"""Residual streams: what the outputs of layers are added to, held while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sink:
    """What becomes of the output of one weight.

    Attributes:
        norm: key of the batch norm that it goes straight into, the id of its running mean.
        call: number of the call that made what the output is added to in the end, if that was there before the weight
            was used: the residual stream.
        back: what takes the shape and scale of that sum back to those of the output, step by step.
    """

    norm: int | None = None
    call: int | None = None
    back: tuple[Step, ...] = ()

    def returned(self, stream: Tensor) -> Tensor:
        """A residual stream, or a difference of two, laid out and scaled like the output of the weight."""
        for step in self.back:
            stream = step(stream)
        return stream


class Retained:
    """Streams of one forward pass that are needed later, each held until its last use.

    Args:
        sinks: by weight.
    """

    def __init__(self, sinks: Mapping[int, Sink]) -> None:
        self._sinks = sinks
        self._open: dict[int, int] = {}
        for sink in sinks.values():
            if sink.call is not None:
                self._open[sink.call] = self._open.get(sink.call, 0) + 1
        self._streams: dict[int, Tensor] = {}
        self._calls = 0

    def count(self) -> int:
        """The number of the call that begins."""
        self._calls += 1
        return self._calls - 1

    def note(self, number: int, output: Any) -> None:
        """Hold the output of a call, if it is needed."""
        if number in self._open and isinstance(output, Tensor):
            self._streams[number] = output

    def take(self, key: int) -> Tensor | None:
        """What the output of a weight is going to be added to, laid out like that output."""
        sink = self._sinks.get(key)
        if sink is None or sink.call is None:
            return None
        self._open[sink.call] -= 1
        stream = self._streams.get(sink.call) if self._open[sink.call] else self._streams.pop(sink.call, None)
        return None if stream is None else sink.returned(stream)
