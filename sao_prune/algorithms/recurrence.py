"""Recurrent layers as matrices: what each of them multiplies, over all steps of a sequence at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .uses import Use

# What a step gets wrong comes back in the next: values that stay nearer to those kept do better over a sequence.
_DAMPING = 100.0
_GATES = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}


def recurrent(func: Callable[..., Any], args: Sequence[Any]) -> Sequence[Tensor]:
    """The weights and biases of a call that runs a recurrent layer; of another call none.

    Example:
        >>> recurrent(torch.add, (torch.ones(2), torch.ones(2)))
        ()
    """
    if func not in _GATES:
        return ()
    weights: Sequence[Tensor] = args[3] if _packed(args) else args[2]
    return weights


def recurrent_uses(func: Callable[..., Any], args: Sequence[Any]) -> Iterator[Use]:
    """The weights of a recurrent layer with what they multiply: the inputs of all steps, or the states before them.

    Weights may be changed as they come: what comes after is computed with what they are then, the states that a
    recurrent weight sees those that it leads to as it is itself.

    Args:
        func: `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`.
        args: of the call, as `torch.nn.LSTM`, .. make it, packed sequences too.
    """
    if _packed(args):
        x, sizes, states, weights, biased, layers, _, _, both = args
        time, lengths = 0, sizes.tolist()
    else:
        x, states, weights, biased, layers, _, _, both, batch_first = args
        time, lengths = int(batch_first), None
    pair, sides = isinstance(states, tuple | list), 1 + both
    per = len(weights) // (layers * sides)
    for layer in range(layers):
        own = weights[layer * sides * per : (layer + 1) * sides * per]
        here = slice(layer * sides, (layer + 1) * sides)
        start = tuple(s[here] for s in states) if pair else states[here]
        begin = (x,) if lengths is None else (x, sizes)
        rest = (own, biased, 1, 0.0, False, both, *(() if lengths is not None else (batch_first,)))
        of_side = [own[side * per : (side + 1) * per] for side in range(sides)]
        for side in of_side:
            yield Use(id(side[0]), (x,) * _GATES[func], side[2] if biased else None)
            if per % 2:
                # The projection of an LSTM: what it multiplies stays inside.
                yield Use(id(side[-1]), ())
        outputs = func(*begin, start, *rest)[0].chunk(sides, -1)
        for number, side in enumerate(of_side):
            first = (start[0] if pair else start)[number]
            before = _before(outputs[number], first, lengths, time, backwards=number == 1)
            bias = side[3] if biased else None
            yield Use(id(side[1]), (before,) * _GATES[func], bias, damping=_DAMPING)
        if layer + 1 < layers:
            x = func(*begin, start, *rest)[0]


def _packed(args: Sequence[Any]) -> bool:
    """Whether sequences are packed: sizes of batches come second, weights fourth."""
    return isinstance(args[3], tuple | list)


def _before(y: Tensor, first: Tensor, lengths: list[int] | None, time: int, *, backwards: bool) -> Tensor:
    """The state before every step, laid out like the states after them."""
    steps = list(y.unbind(time) if lengths is None else y.split(lengths))
    if backwards:
        later = [*steps[1:], first[:0]]
        found = [torch.cat([after, first[len(after) : len(now)]]) for now, after in zip(steps, later)]
    else:
        found = [earlier[: len(now)] for now, earlier in zip(steps, [first, *steps[:-1]])]
    return torch.stack(found, time) if lengths is None else torch.cat(found)
