"""What a call of torch uses of a model: which weight, with which inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_NORM = inspect.signature(F.batch_norm)
_PRODUCTS = {f for name in ("matmul", "mm", "bmm") for f in (getattr(torch, name), getattr(Tensor, name))} | {
    Tensor.__matmul__
}


@dataclass(frozen=True)
class Stack:
    """A weight of several matrices, each used for itself, as those of experts are.

    Attributes:
        keys: of the matrices.
        transposed: whether inputs come before outputs.
    """

    keys: Sequence[int]
    transposed: bool


@dataclass(frozen=True)
class Use:
    """One tensor of the model at work: a weight with its inputs, or the running mean of a batch norm.

    Attributes:
        key: id of the weight or of the running mean.
        inputs: one tensor for each of the weight's parts, or one for all of them; none where they are not known.
        bias: what is added to the output, from entry ``bias_at`` on.
        conv: of a convolution ``kernel``, ``stride``, ``padding`` and ``dilation``.
        variance, scale, eps: of a batch norm the running variance, the weight and what is added to the variance.
        stream: what the output is going to be added to, laid out and scaled like the output, where that is there.
        damping: factor on the ridge, where errors come back to the weight itself.
        inputs_first: of a product whether inputs come before outputs in the weight.
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
    damping: float = 1.0
    inputs_first: bool | None = None


def projections(given: Mapping[str, Any], sources: tuple[Tensor, ...]) -> list[tuple[int, tuple[Tensor, ...], int]]:
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
        owner, turned = _owner(given["weight"])
        return Use(id(owner), (given["input"],), given.get("bias"), inputs_first=turned)
    if func is torch.addmm and len(args) == 3:
        owner, turned = _owner(args[2])
        return Use(id(owner), (args[1],), args[0], inputs_first=not turned)
    if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], Tensor) and args[1].dim() == 2:
        owner, turned = _owner(args[1])
        return Use(id(owner), (args[0],), inputs_first=not turned) if isinstance(owner, nn.Parameter) else None
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


def _owner(weight: Tensor) -> tuple[Tensor, bool]:
    """The matrix that a view is all of and whether that is transposed; any other tensor as it is."""
    base = weight._base
    if base is None or base.dim() != 2 or weight.dim() != 2 or weight.storage_offset() != base.storage_offset():
        return weight, False
    if (weight.shape, weight.stride()) == (base.shape, base.stride()):
        return base, False
    turned = (weight.shape, weight.stride()) == (base.shape[::-1], base.stride()[::-1])
    return (base, True) if turned else (weight, False)


def _each(value: Any, dims: int) -> Any:
    """One number a dimension; words such as ``"same"`` as they are."""
    if isinstance(value, str):
        return value
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def stack_uses(func: Any, args: Any, kwargs: Mapping[str, Any], stacks: Mapping[int, Stack]) -> list[Use]:
    """What a call uses of the stacks: one of the matrices, or all of them with their own inputs each.

    Args:
        func: that is called.
        args: of the call.
        kwargs: of the call.
        stacks: by the ids of their tensors.
    """
    if func is F.linear:
        given, outer = dict(zip(("input", "weight"), args), **kwargs), True
    elif func in _PRODUCTS and len(args) == 2:
        given, outer = {"input": args[0], "weight": args[1]}, False
    else:
        return []
    x, weight = given["input"], given["weight"]
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() < 2:
        return []
    # What indexing and transposing give are views, which know what they are of.
    whole = weight if id(weight) in stacks else weight._base
    stack = None if whole is None else stacks.get(id(whole))
    if whole is None or stack is None or not whole.is_contiguous():
        return []
    size = whole.shape[-2:]
    turned = weight.stride()[-2:] == (1, size[1]) and weight.shape[-2:] == size[::-1]
    as_it_is = weight.stride()[-2:] == (size[1], 1) and weight.shape[-2:] == size
    # ``linear`` has the inputs last, a product first.
    if not (as_it_is if stack.transposed is not outer else turned):
        return []
    at, rest = divmod(int(weight.storage_offset()) - int(whole.storage_offset()), size.numel())
    if weight.dim() == 2 and not rest:
        return [Use(stack.keys[at], (x,))]
    if weight.numel() != whole.numel() or weight.dim() != 3 or x.dim() not in (2, 3):
        return []
    return [Use(key, (x if x.dim() == 2 else x[min(part, len(x) - 1)],)) for part, key in enumerate(stack.keys)]
