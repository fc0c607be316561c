"""Calibration data: batches from whatever a loader gives, and the rows of inputs that a layer multiplies."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import tree_leaves, tree_map

_CHUNK = 2**23


class Replayed:
    """What an iterator gives, as often as it is asked for: what was read is kept.

    Example:
        >>> batches = Replayed(iter("abc"))
        >>> next(iter(batches)), list(batches)
        ('a', ['a', 'b', 'c'])
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._read = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        yield from self._read
        for batch in self._source:
            self._read.append(batch)
            yield batch


def read_batches(model: nn.Module, inputs: Any, samples: int) -> list[Any]:
    """The first examples of a loader as arguments of the model; one batch where the batches can be joined.

    Args:
        model: whose ``forward`` tells which entries of a mapping it takes; the others, labels say, are dropped.
        inputs: a tensor, a mapping of keyword arguments, or an iterable of batches: tensors, mappings, or tuples whose
            first element is the input.
        samples: how many examples to read.

    Raises:
        TypeError: for anything else.
        ValueError: without data, or for data that is not finite.
    """
    source: Iterable[Any] = [inputs] if isinstance(inputs, Tensor | Mapping) else inputs
    if not isinstance(source, Iterable) or isinstance(source, str | bytes):
        raise TypeError(f"inputs must be a tensor, a mapping or an iterable of batches, got {type(inputs).__name__}")
    batches: list[Any] = []
    missing = samples
    for number, batch in enumerate(source):
        taken = _input_of(model, batch, number)
        _check_kind(taken, batches, number)
        count = _examples(taken, number)
        batches.append(taken if count <= missing else _first(taken, count, missing))
        missing -= min(count, missing)
        if not missing:
            break
    if not batches:
        raise ValueError("there are no calibration data: inputs gave no batch; give a loader, or a tensor of examples")
    return _joined(batches)


def _input_of(model: nn.Module, batch: Any, number: int) -> Any:
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError(f"calibration batch {number} is empty")
        batch = batch[0]
    if isinstance(batch, Mapping):
        known = inspect.signature(model.forward).parameters
        every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        taken = {key: value for key, value in batch.items() if every or key in known}
        if batch and not taken:
            held, whose = ", ".join(map(str, batch)), f"{type(model).__name__}.forward"
            raise ValueError(
                f"calibration batch {number} holds {held}, of which {whose} takes nothing: it takes {', '.join(known)}"
            )
        batch = taken
    elif not isinstance(batch, Tensor):
        raise TypeError(
            f"calibration batch {number} is a {type(batch).__name__}: batches are tensors, mappings of keyword "
            "arguments, or tuples whose first element is one of these"
        )
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
            layout = str(leaf.layout).removeprefix("torch.")
            raise TypeError(f"calibration batch {number} holds a tensor of layout {layout}: make it dense")
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"calibration batch {number} holds NaN or infinite values")
    return batch


def _check_kind(batch: Any, batches: list[Any], number: int) -> None:
    """Refuse what is no more of the same: labels, where one batch was given in place of a list of batches."""
    first = batches[0] if batches else batch
    if not isinstance(batch, Tensor) or not isinstance(first, Tensor):
        return
    if batch.dim() != first.dim() or batch.is_floating_point() is not first.is_floating_point():
        was, got = (f"{str(b.dtype).removeprefix('torch.')} {tuple(b.shape)}" for b in (first, batch))
        raise ValueError(
            f"calibration batch {number} is {got}, batch 0 {was}: inputs is a list of batches; if these are the inputs "
            "and labels of one batch, give the inputs alone"
        )


def _examples(batch: Any, number: int) -> int:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or not len(tensors[0]):
        raise ValueError(f"calibration batch {number} holds no examples: there must be a tensor with them in it")
    return len(tensors[0])


def _first(batch: Any, count: int, wanted: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[:wanted] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

    return tree_map(cut, batch)


def _joined(batches: list[Any]) -> list[Any]:
    """One batch of all, where their tensors agree in everything but the number of examples; else as they are."""
    forms = {str(tree_map(lambda t: (t.shape[1:], t.dtype) if isinstance(t, Tensor) else t, b)) for b in batches}
    whole = all(isinstance(t, Tensor) and t.dim() for b in batches for t in tree_leaves(b))
    if len(batches) == 1 or len(forms) > 1 or not whole:
        return batches
    if isinstance(batches[0], Tensor):
        return [torch.cat(batches)]
    if not all(isinstance(t, Tensor) for t in batches[0].values()):
        return batches
    return [{key: torch.cat([b[key] for b in batches]) for key in batches[0]}]


class Rows:
    """The inputs of one matrix as rows, taken a chunk at a time, so that no copy of all of them exists.

    Args:
        inputs: one tensor a batch: ``(.., n)`` for a matrix, ``(batch, channels, *space)`` for a convolution.
        most: how many rows to use; a random choice where there are more.
        generator: where that choice comes from.
        conv: of a convolution ``kernel``, ``stride``, ``padding`` and ``dilation``, each one number a dimension of
            space; ``None`` for a matrix.
    """

    def __init__(
        self, inputs: Sequence[Tensor], most: int, generator: torch.Generator, conv: Mapping[str, Any] | None = None
    ) -> None:
        self._conv = conv
        self._inputs = [_pad(x, conv) if conv else x.reshape(-1, x.shape[-1]) for x in inputs]
        counts = torch.tensor([self._places(x) for x in self._inputs], device="cpu")
        total = int(counts.sum())
        if total > most:
            picked = torch.randperm(total, generator=generator, device="cpu")[:most].sort().values
        else:
            picked = torch.arange(total, device="cpu")
        ends = counts.cumsum(0)
        batch = torch.bucketize(picked, ends, right=True)
        self._picked = [picked[batch == b] - (int(ends[b]) - int(counts[b])) for b in range(len(counts))]
        self.count = len(picked)

    def chunks(self, part: int, width: int) -> Iterable[Tensor]:
        """``(rows, n * taps)`` chunks of the inputs ``part * width .. (part + 1) * width``, in float32 or better."""
        taps = 1 if self._conv is None else _taps(self._conv).shape[0]
        step = max(_CHUNK // (width * taps), 1)
        for x, picked in zip(self._inputs, self._picked):
            for index in picked.split(step):
                where = index.to(x.device)
                channels = slice(part * width, (part + 1) * width)
                rows = x[where, channels] if self._conv is None else _patches(x[:, channels], where, self._conv)
                yield rows if rows.dtype == torch.float64 else rows.float()

    def match(self, made: Sequence[Tensor], channels: int) -> bool:
        """Whether tensors are laid out like the outputs."""
        for x, y in zip(self._inputs, made, strict=True):
            along = -1 if self._conv is None or y.dim() <= len(self._conv["kernel"]) else -1 - len(self._conv["kernel"])
            if y.shape[along] != channels or y.numel() != self._places(x) * channels:
                return False
        return True

    def outputs(self, made: Sequence[Tensor], channels: slice, width: int) -> Iterable[Tensor]:
        """The same rows of tensors laid out like the outputs, chunk by chunk as `chunks` gives the inputs."""
        taps = 1 if self._conv is None else _taps(self._conv).shape[0]
        step = max(_CHUNK // (width * taps), 1)
        for y, picked in zip(made, self._picked):
            if self._conv is not None:
                y = (y if y.dim() == len(self._conv["kernel"]) + 2 else y[None]).movedim(1, -1)
            y = y.reshape(-1, y.shape[-1])
            for index in picked.split(step):
                yield y[index.to(y.device), channels]

    def _places(self, x: Tensor) -> int:
        return len(x) if self._conv is None else len(x) * _outputs(x, self._conv).numel()


def moments(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor, bool]:
    """Mean and variance of every column, in one pass, and whether all of it was finite."""
    count, mean = 0, torch.zeros((), device="cpu")
    squares = mean.clone()
    for x in chunks:
        rows, own = len(x), x.mean(0, dtype=torch.float64)
        apart = (x - own.to(x.dtype)).square().sum(0, dtype=torch.float64)
        if not count:
            count, mean, squares = rows, own, apart
            continue
        shift = own - mean
        squares = squares + apart + shift.square() * (count * rows / (count + rows))
        mean = mean + shift * (rows / (count + rows))
        count += rows
    return mean, squares / max(count, 1), bool(torch.isfinite(mean).all() and torch.isfinite(squares).all())


def _pad(x: Tensor, conv: Mapping[str, Any]) -> Tensor:
    """The input with its zero padding, batch dimension and all."""
    dims = len(conv["kernel"])
    x = x if x.dim() == dims + 2 else x[None]
    padding = conv["padding"]
    if padding == "valid":
        return x
    pads: list[int] = []
    for axis in reversed(range(dims)):
        if padding == "same":
            both = conv["dilation"][axis] * (conv["kernel"][axis] - 1)
            pads += [both // 2, both - both // 2]
        else:
            pads += [padding[axis]] * 2
    return F.pad(x, pads) if any(pads) else x


def _outputs(x: Tensor, conv: Mapping[str, Any]) -> Tensor:
    """An empty tensor of the output's spatial shape."""
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], conv["kernel"], conv["stride"], conv["dilation"])
    ]
    return torch.empty(sizes, device="meta")


def _taps(conv: Mapping[str, Any]) -> Tensor:
    """Offset of every tap from the first, ``(taps, dimensions)``, in the order of the kernel."""
    axes = [torch.arange(k, device="cpu") * d for k, d in zip(conv["kernel"], conv["dilation"])]
    return torch.cartesian_prod(*axes).view(-1, len(axes))


def _patches(x: Tensor, places: Tensor, conv: Mapping[str, Any]) -> Tensor:
    """What the kernel meets at some of the places of the output, ``(places, channels * taps)``."""
    shape, offsets = _outputs(x, conv).shape, _taps(conv).to(x.device)
    inner = torch.Size(shape).numel()
    corner = torch.stack(torch.unravel_index(places % inner, shape), 1)
    corner = corner * torch.tensor(conv["stride"], device=x.device)
    spots = corner[:, None, :] + offsets
    flat = torch.zeros_like(spots[..., 0])
    for axis, size in enumerate(x.shape[2:]):
        flat = flat * size + spots[..., axis]
    found = x.flatten(2)[(places // inner)[:, None], :, flat]
    return found.mT.flatten(1)
