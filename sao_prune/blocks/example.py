"""What a model takes, as data: shapes, types and ranges of an example input, by which a loaded model is tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

_FLOATS = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_COUNTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TYPES = _FLOATS | {str(t).removeprefix("torch."): t for t in _COUNTS}
# Entries of all tensors together; an example with more is not kept.
_MOST = 1 << 26
_DEEPEST = 8
_LARGEST = 1 << 53
_KEPT = "_compact_example"


@dataclass(frozen=True)
class Example:
    """Shapes, types and ranges of the tensors of an example input, and the other arguments; none of its values.

    Attributes:
        data: nested dicts, as they are in JSON.
    """

    data: Any

    @classmethod
    def of(cls, example_input: Any) -> Example | None:
        """What can be said of an example input; ``None`` where it holds other things than strided tensors, numbers and
        text in tuples, lists and mappings, or is very large.

        Example:
            >>> example = Example.of((torch.tensor([[3, 5]]), {"scale": 2.0}))
            >>> ids, options = example.draw()
            >>> ids.shape, ids.dtype, options
            (torch.Size([1, 2]), torch.int64, {'scale': 2.0})
        """
        try:
            return cls.from_data(_described(example_input))
        except ValueError:
            return None

    @classmethod
    def from_data(cls, data: Any) -> Example:
        """Read it back.

        Raises:
            ValueError: if it is none.
        """
        if sum(prod(shape) for shape in _checked(data)) > _MOST:
            raise ValueError("the example input is too large")
        return cls(data)

    def draw(self) -> Any:
        """Random tensors of these shapes and types within the ranges, always the same, in the same nest."""
        return _drawn(self.data, torch.Generator().manual_seed(0))


def keep_example(model: nn.Module, example: Example | None) -> None:
    """Let a compact model know what it takes; ``None`` forgets it."""
    model.__dict__.pop(_KEPT, None)
    if example is not None:
        model.__dict__[_KEPT] = example


def examples_in(model: nn.Module) -> dict[str, Example]:
    """What the modules of a model take that know it, by path."""
    return {path: module.__dict__[_KEPT] for path, module in model.named_modules() if _KEPT in module.__dict__}


def _described(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        name = str(tree.dtype).removeprefix("torch.")
        if (
            type(tree) not in (Tensor, nn.Parameter)
            or name not in _TYPES
            or tree.layout != torch.strided
            or tree.is_meta
        ):
            raise ValueError("a tensor of another kind")
        return {"tensor": list(tree.shape), "dtype": name, "range": _range(tree.detach(), name in _FLOATS)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    if type(tree) in (tuple, list):
        return {"items": [_described(each) for each in tree], "tuple": type(tree) is tuple}
    if isinstance(tree, Mapping):
        return {"entries": {key: _described(value) for key, value in tree.items()}}
    raise ValueError(f"neither tensor nor number: {type(tree).__name__}")


def _range(tensor: Tensor, floating: bool) -> list[float] | list[int]:
    finite = tensor[torch.isfinite(tensor)] if floating else tensor.long()
    if finite.numel() == 0:
        return [-1.0, 1.0] if floating else [0, 0]
    low, high = finite.min().item(), finite.max().item()
    if floating and low == high:
        # A constant input would tell little of a model: from zero to it, and to one in place of zero.
        return sorted((0.0, low or 1.0))
    return [low, high]


def _checked(data: Any, depth: int = 0) -> Iterator[tuple[int, ...]]:
    """The shapes of the tensors in what may come from a file.

    Raises:
        ValueError: for anything that is not an example.
    """
    kind = set(data) if isinstance(data, dict) and depth <= _DEEPEST else set()
    if kind == {"tensor", "dtype", "range"}:
        _check_tensor(data["tensor"], data["dtype"], data["range"])
        yield tuple(data["tensor"])
    elif kind == {"value"} and (data["value"] is None or isinstance(data["value"], bool | int | float | str)):
        return
    elif kind == {"items", "tuple"} and isinstance(data["items"], list):
        for each in data["items"]:
            yield from _checked(each, depth + 1)
    elif kind == {"entries"} and isinstance(data["entries"], dict):
        for key, each in data["entries"].items():
            if not isinstance(key, str):
                raise ValueError("names of arguments are text")
            yield from _checked(each, depth + 1)
    else:
        raise ValueError("not an example input")


def _check_tensor(shape: Any, dtype: Any, span: Any) -> None:
    if not isinstance(dtype, str) or dtype not in _TYPES or not isinstance(shape, list) or not isinstance(span, list):
        raise ValueError("not a tensor of an example input")
    bounds = (0, 1) if dtype == "bool" else _bounds(_TYPES[dtype])
    number = (int, float) if dtype in _FLOATS else int
    numbers = len(span) == 2 and all(isinstance(n, number) for n in span)
    if not numbers or not bounds[0] <= span[0] <= span[1] <= bounds[1]:
        raise ValueError("not the range of a tensor")
    if len(shape) > _DEEPEST or not all(type(n) is int and 0 <= n <= _MOST for n in shape):
        raise ValueError("not the shape of a tensor")


def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    most = info.max if dtype.is_floating_point else min(info.max, _LARGEST)
    return max(info.min, -most), most


def _drawn(data: Any, generator: torch.Generator) -> Any:
    if "tensor" in data:
        shape, (low, high), dtype = data["tensor"], data["range"], _TYPES[data["dtype"]]
        if dtype.is_floating_point:
            share = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return (share * (high - low) + low).to(dtype)
        return torch.randint(low, high + 1, shape, generator=generator, device="cpu").to(dtype)
    if "items" in data:
        items = [_drawn(each, generator) for each in data["items"]]
        return tuple(items) if data["tuple"] else items
    if "entries" in data:
        return {key: _drawn(value, generator) for key, value in data["entries"].items()}
    return data["value"]
