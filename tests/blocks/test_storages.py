"""Memory that is taken away or replaced between forward and backward raises or is followed, and never crashes."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from sao_prune.blocks import BlockConv2d, BlockLinear
from sao_prune.topology import interleaved

from .cases import NATIVE, fuse, randomise


def _nets() -> list[tuple[nn.Module, Tensor]]:
    mlp = nn.Sequential(BlockLinear(interleaved(32, 16, 4)), nn.GELU(), BlockLinear(interleaved(16, 32, 4)))
    cnn = nn.Sequential(BlockConv2d(interleaved(16, 16, 4), 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    plain = nn.Sequential(BlockLinear(interleaved(16, 16, 4)))
    plain[0].run_as(NATIVE)
    found = [(fuse(mlp, torch.randn(5, 16)), torch.randn(5, 16)), (plain, torch.randn(5, 16))]
    found.append((fuse(cnn, torch.randn(2, 16, 6, 6)), torch.randn(2, 16, 6, 6)))
    for net, _ in found:
        randomise(net)
    return found


@pytest.mark.parametrize("case", range(3))
def test_freed_memory(case):
    net, x = _nets()[case]
    for parameter in net.parameters():
        y = net(x.clone().requires_grad_())
        storage = parameter.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        with suppress(RuntimeError):
            y.sum().backward()
        with suppress(RuntimeError):
            net(x)
        storage.resize_(size)
        with torch.no_grad():
            parameter.normal_()
    assert net(x).isfinite().all()


@pytest.mark.parametrize("case", range(3))
def test_saved_tensors_that_move(case):
    net, x = _nets()[case]
    plain = copy.deepcopy(net)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone().numpy(), torch.from_numpy):
        y = net(x)
    y.sum().backward()
    plain(x).sum().backward()
    for one, other in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("how", ["data", "swap"])
def test_parameters_that_are_swapped(case, how):
    net, x = _nets()[case]
    other = copy.deepcopy(net)
    randomise(other)
    net(x).sum().backward()
    net.zero_grad()
    for mine, theirs in zip(net.parameters(), copy.deepcopy(other).parameters()):
        if how == "data":
            mine.data = theirs.data
        else:
            torch.utils.swap_tensors(mine, theirs)
    torch.testing.assert_close(net(x), other(x), rtol=1e-4, atol=1e-4)
