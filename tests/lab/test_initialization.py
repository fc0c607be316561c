"""Initial weights of other work: what their papers say of them."""

from __future__ import annotations

import pytest
import torch

from sao_prune.lab.errors import LabError
from sao_prune.lab.network import initial_network

IMAGE = {"in_chans": 3, "img_size": 8}


def test_he_keeps_the_variance_that_relu_halves() -> None:
    net = initial_network("sao_resnet", {"depth": 8, "norm": "none"}, 10, IMAGE, init="he")
    weight = net.stages[2][0].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert not bool(net.stages[2][0].conv2.bias.any())


def test_fixup_starts_as_the_shortcuts_alone_and_scales_by_the_number_of_blocks() -> None:
    he = initial_network("sao_resnet", {"depth": 56, "norm": "none"}, 10, IMAGE, init="he")
    net = initial_network("sao_resnet", {"depth": 56, "norm": "none"}, 10, IMAGE, init="fixup")
    for one, other in zip(he.stages.modules(), net.stages.modules()):
        if hasattr(one, "conv1"):
            torch.testing.assert_close(other.conv1.weight, one.conv1.weight * 27**-0.5)
            assert not bool(other.conv2.weight.any())
    assert not bool(net.head.weight.any())
    x = torch.randn(2, 3, 8, 8)
    features = net.stages[0](net.act(net.stem(x)))
    torch.testing.assert_close(features, net.act(net.stem(x)))


def test_skipinit_starts_as_the_shortcuts_alone_and_can_leave_them() -> None:
    net = initial_network("sao_resnet", {"depth": 8, "norm": "none", "branch_scale": 0.0}, 10, IMAGE, init="he")
    x = torch.randn(2, 3, 8, 8)
    stem = net.act(net.stem(x))
    torch.testing.assert_close(net.stages[0](stem), stem)
    net(x).square().sum().backward()
    assert all(bool(b.scale.factor.grad) for b in net.stages.modules() if hasattr(b, "scale"))


def test_fixup_without_residual_blocks_is_one_sentence() -> None:
    with pytest.raises(LabError, match="fixup"):
        initial_network("sao_mlp7", {}, 3, {"in_chans": 1, "img_size": 4}, init="fixup")
