"""Batch norms as factors of the block layers before them: what a model in eval mode needs no operation for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .absorbed import with_activation
from .eligible import tied
from .following import Flow, Watch
from .modules import BlockLinear, BlockModule

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_norms(model: nn.Module, example_input: Any) -> int:
    """Multiply the batch norms behind block layers into their blocks and biases, in place; eval mode stays the same.

    A norm that is nobody else's goes; of timm's norms with an activation that stays.

    Args:
        model: without epilogues; a copy, as parameters and modules change.
        example_input: what to run it on, once, to find which norm follows which layer.

    Returns:
        How many norms went.

    Raises:
        ValueError: if the model fails on the example input.

    Example:
        >>> from sao_prune.blocks import BlockConv2d
        >>> from sao_prune.topology import interleaved
        >>> net = nn.Sequential(BlockConv2d(interleaved(8, 8, 2), 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold_norms(net, torch.randn(1, 8, 5, 5)), net[1]
        (1, Identity())
    """
    watch = Watch([m for m in model.modules() if _is_plain(m)], _follows)
    watch.run(model, example_input)
    shared, done = tied(model), 0
    for flow in watch.flows:
        if flow.then is not None or not flow.steps or flow.before is None or flow.before.uses != 1:
            continue
        layer, norm = flow.owner, flow.steps[0]
        if norm.training or any(watch.calls[id(m)] != 1 or id(m) in shared for m in (layer, norm)):
            continue
        assert isinstance(layer, BlockModule)
        _multiply(layer, norm)
        act = norm.act if type(norm) in with_activation() else nn.Identity()
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is norm:
                    parent._modules[name] = act  # type: ignore[assignment]
        done += 1
    return done


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a block layer whose blocks are what it computes with, and nothing else happens there."""
    if not isinstance(module, BlockModule) or type(module).values is not BlockModule.values:
        return False
    return type(module._parameters.get("blocks")) is nn.Parameter and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _follows(flow: Flow, module: nn.Module, x: Tensor) -> bool:
    if flow.steps or _has_hooks(module):
        return False
    kind: Any = type(module)
    if kind in with_activation():
        known = type(module.drop) is nn.Identity and isinstance(module.act, nn.Module)
    else:
        known = kind in NORMS
    # A linear layer has its channels last, a batch norm takes dimension 1 for them.
    return known and module.running_mean is not None and (x.dim() == 2 or not isinstance(flow.owner, BlockLinear))


@torch.no_grad()
def _multiply(layer: BlockModule, norm: Any) -> None:
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
    kernel = layer.weight_shape[2:]
    rows = torch.cat([b.rows[:, :, None].expand(b.shape).flatten() for b in layer.topology.buckets])
    factors = scale[rows.to(scale.device)].view(-1, *[1] * len(kernel))
    layer.blocks.copy_((layer.blocks.reshape(-1, *kernel) * factors).view(layer.blocks.shape))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.blocks.dtype), requires_grad=layer.blocks.requires_grad)
    else:
        layer.bias.copy_(layer.bias * scale + shift)
