"""What the tests of block layers share: topologies of every kind, and the dense layer as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sao_prune.blocks import BlockModule, Execution
from sao_prune.blocks.autotune import Candidate, default_plan, with_steps
from sao_prune.blocks.backends import cpu
from sao_prune.blocks.fusion import chains
from sao_prune.blocks.modules import NormedConv2d, block_slots
from sao_prune.blocks.plan import carry_out, normed
from sao_prune.topology import BlockTopology, interleaved, make_topology, ramanujan

NATIVE = Execution(native=True)
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C compiler that the kernels can be built with")


def irregular(rows: int, cols: int, groups: int) -> BlockTopology:
    """Blocks of one shape whose channels lie anywhere."""
    return ramanujan(rows, cols, groups, generator=torch.Generator().manual_seed(rows + 31 * cols))


def identity(rows: int, cols: int, groups: int) -> BlockTopology:
    """Blocks along the diagonal."""
    sets = torch.arange(groups)
    return BlockTopology(sets.repeat_interleave(rows // groups), sets.repeat_interleave(cols // groups))


def uneven(rows: int, cols: int, groups: int) -> BlockTopology:
    """Blocks of several shapes, and a row and a column in none."""
    row_set, col_set = torch.arange(rows) % groups, torch.arange(cols) % (groups + 1) % groups
    row_set[1], col_set[-1] = -1, -1
    return BlockTopology(row_set, col_set)


LAYOUTS: dict[str, Callable[[int, int, int], BlockTopology]] = {
    "identity": identity,
    "strided": interleaved,
    "irregular": irregular,
    "uneven": uneven,
}


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


def randomise(module: nn.Module) -> None:
    """Values without any structure."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)


def owners(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that have epilogues, or may have."""
    return [m for m in model.modules() if isinstance(m, (BlockModule, NormedConv2d))]


def block_layers(model: nn.Module) -> list[BlockModule]:
    """All block layers of a model."""
    return [m for m in model.modules() if isinstance(m, BlockModule)]


def set_dense(layer: BlockModule, dense: nn.Module) -> nn.Module:
    """Give a dense layer a block layer's weight and bias."""
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


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


def fuse(model: nn.Module, x: Tensor, execution: Execution = NATIVE) -> nn.Module:
    """Give the block layers of a model their epilogues, whatever made them."""
    layers = block_layers(model)
    for layer in layers:
        layer.run_as(execution)
    paths = {id(m): name for name, m in model.named_modules()}
    plan = default_plan([Candidate(paths[id(layer)], layer, layer) for layer in layers])
    dense = [m for m in model.modules() if type(m) is nn.Conv2d]
    follow = chains(model, [*layers, *dense], x)[0]
    carry_out(model, with_steps(replace(plan, choices={**normed(model, follow), **plan.choices}), follow))
    return model


def assert_all_close(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float = 1e-3) -> None:
    """Tensors agree relative to the largest value of each."""
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale, check_dtype=False)
