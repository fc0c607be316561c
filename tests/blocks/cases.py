"""What the tests of compact execution share: topologies of every kind, and the dense layer as the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sao_prune.blocks import BlockModule
from sao_prune.blocks.base import block_slots
from sao_prune.blocks.follow import followers
from sao_prune.topology import BlockTopology, make_topology


@st.composite
def topologies(draw: st.DrawFn, largest: int = 24, cols: int | None = None) -> BlockTopology:
    """Even and uneven, square and not, of both kinds, sometimes with channels that nothing is joined to."""
    rows, cols = draw(st.integers(1, largest)), cols or draw(st.integers(1, largest))
    kind = draw(st.sampled_from(["ramanujan", "interleaved"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        groups = draw(st.integers(1, min(rows, cols)))
        topology = make_topology(kind, rows, cols, groups=groups, generator=generator)
    else:
        nnz = draw(st.integers(max(rows, cols), rows * cols))
        topology = make_topology(kind, rows, cols, nnz=nnz, generator=generator)
    if draw(st.integers(0, 3)) == 0 and rows > 2 and cols > 2:
        row_set, col_set = topology.row_set.clone(), topology.col_set.clone()
        row_set[draw(st.integers(0, rows - 1))] = -1
        col_set[draw(st.integers(0, cols - 1))] = -1
        loose = BlockTopology(row_set, col_set)
        topology = loose if loose.groups else topology
    return topology


def randomise(layer: nn.Module) -> None:
    """Values without any structure."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)


def assert_same(layer: BlockModule, dense: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    """Outputs and all gradients of a block layer (in float64) are those of the dense layer with its weight."""
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(mine), dense(theirs)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=tolerance)
    assert isinstance(dense.weight.grad, Tensor)
    slots = block_slots(layer.topology, layer.parts)
    blocks = dense.weight.grad.flatten(0, 1)[slots].view(layer.blocks.shape)
    torch.testing.assert_close(layer.blocks.grad, blocks, rtol=0, atol=tolerance)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=0, atol=tolerance)
    # Activations change an output in place, and gradients come as parts of wider tensors or expanded.
    again = x.clone().requires_grad_()
    y = layer(again * 1)
    dimension = 1 if y.dim() > 2 and isinstance(dense, nn.modules.conv._ConvNd) else -1
    width = gradient.shape[dimension]
    part = torch.cat([gradient, gradient], dimension).narrow(dimension, 0, width)
    (grad,) = torch.autograd.grad(y, again, part, retain_graph=True)
    torch.testing.assert_close(grad, theirs.grad, rtol=0, atol=tolerance)
    one = torch.ones((), dtype=y.dtype).expand(y.shape)
    expected = torch.autograd.grad(dense(theirs), theirs, one)[0]
    torch.testing.assert_close(torch.autograd.grad(y, again, one)[0], expected, rtol=0, atol=tolerance)
    layer(again * 1).relu_().sum().backward()


def fuse(model: nn.Module, x: Tensor) -> None:
    """Let every native layer compute what follows it, as tuning does where that is faster."""
    layers = [m for m in model.modules() if isinstance(m, BlockModule) and m.execution.native]
    found = followers(model, layers, x)
    for layer in layers:
        if id(layer) in found:
            layer.__dict__["execution"] = replace(layer.execution, fused=found[id(layer)].names)
            layer.__dict__["followers"] = found[id(layer)].modules
