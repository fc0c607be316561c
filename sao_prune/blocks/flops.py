"""What the block operators cost, for torch's counter of operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from .stacks import MOST


@lru_cache(maxsize=1)
def register_flops() -> None:
    """Tell torch's counter, once; its import takes time, so it waits for the first block layer."""
    from torch.utils.flop_counter import register_flop_formula

    operators = torch.ops.sao_prune
    stacks = [getattr(operators, f"block_stack{count}") for count in range(2, MOST + 1)]
    stacks_backward = [getattr(operators, f"block_stack{count}_backward") for count in range(2, MOST + 1)]
    formulas: dict[Callable[..., int], list[Any]] = {
        _linear: [operators.block_linear],
        _linear_backward: [operators.block_linear_backward],
        _conv: [operators.block_conv, operators.block_conv_norm],
        _conv_backward: [operators.block_conv_backward, operators.block_conv_norm_backward],
        _mlp: [operators.block_mlp],
        _mlp_backward: [operators.block_mlp_backward],
        _stack: stacks,
        _stack_backward: stacks_backward,
    }
    for formula, counted in formulas.items():
        register_flop_formula(counted)(formula)


def _linear(x: Any, blocks: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * torch.Size(blocks).numel() * torch.Size(x[:-1]).numel()


def _linear_backward(grad: Any, x: Any, blocks: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(args[-1][:2]) * _linear(x, blocks)


def _conv(x: Any, blocks: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    y = out_shape[0]
    return 2 * torch.Size(blocks).numel() * y[0] * torch.Size(y[2:]).numel()


def _conv_backward(grad: Any, x: Any, blocks: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(args[-1][:2]) * 2 * torch.Size(blocks).numel() * grad[0] * torch.Size(grad[2:]).numel()


def _mlp(x: Any, blocks1: Any, bias1: Any, blocks2: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _linear(x, blocks1) + _linear(x, blocks2)


def _mlp_backward(
    grad: Any, x: Any, blocks1: Any, bias1: Any, blocks2: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    mask = args[-1]
    first, second = _linear(x, blocks1), _linear(x, blocks2)
    return first * (1 + mask[0] + mask[1]) + second * (any(mask[:3]) + mask[3])


def _stack(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(_linear(x, blocks) for blocks in args[: (len(args) - 2) // 2 : 2])


def _stack_backward(grad: Any, x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    mask = args[-1]
    blocks = args[: len(mask) - 1 : 2]
    inputs = [any(mask[: 2 * i + 1]) for i in range(len(blocks))]
    return sum(_linear(x, b) * (need + mask[2 * i + 1]) for i, (b, need) in enumerate(zip(blocks, inputs)))
