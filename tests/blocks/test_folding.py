"""Folding permutations into neighbours changes no function, and what it cannot prove it leaves."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sao_prune.blocks import BlockConv2d, BlockConvTranspose2d, BlockLinear
from sao_prune.blocks.folding import fold
from sao_prune.blocks.modules import NativeMaxPool2d
from sao_prune.blocks.norm_folding import fold_norms
from sao_prune.blocks.permutation import Kind
from sao_prune.topology import interleaved, make_topology, ramanujan

from .cases import LAYOUTS, block_layers, randomise


def topology(kind: str, rows: int, cols: int, groups: int, seed: int = 0):
    return make_topology(kind, rows, cols, groups=groups, generator=torch.Generator().manual_seed(seed))


def assert_folds(model: nn.Module, x: torch.Tensor, count: int | None = None) -> nn.Module:
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.double().eval()
    folded = copy.deepcopy(model)
    done = fold(folded, x.double())
    assert count is None or done == count
    wanted = model(x.double())
    torch.testing.assert_close(folded(x.double()), wanted, rtol=1e-9, atol=1e-9 * float(wanted.detach().abs().max()))
    return folded


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["interleaved", "ramanujan"]), st.sampled_from(["interleaved", "ramanujan"]),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_mlps_of_any_shape(one, two, g1, g2, rows, width, seed):
    hidden = g1 * g2 * rows
    first = BlockLinear(topology(one, hidden, g1 * width, g1, seed))
    second = BlockLinear(topology(two, g2 * width, hidden, g2, seed + 1))
    assert_folds(nn.Sequential(first, nn.GELU(), nn.Dropout(), second), torch.randn(2, 3, g1 * width))


def test_irregular_outputs_become_the_identity():
    model = nn.Sequential(BlockLinear(ramanujan(64, 16, 4)), nn.Tanh(), BlockLinear(ramanujan(16, 64, 4)))
    folded = assert_folds(model, torch.randn(5, 16), 1)
    assert folded[0].layout.outputs.kind is Kind.IDENTITY


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("pool", [nn.MaxPool2d, NativeMaxPool2d])
def test_convolutions_and_the_norms_between(norm, inplace, pool):
    layers = [
        BlockConv2d(ramanujan(32, 8, 4), 3, padding=1),
        *([nn.BatchNorm2d(32)] if norm else []),
        nn.ReLU(inplace=inplace),
        pool(2),
        BlockConv2d(ramanujan(8, 32, 4), 1),
    ]
    assert_folds(nn.Sequential(*layers), torch.randn(2, 8, 6, 6), 1)


@pytest.mark.parametrize("same", [True, False])
def test_depthwise_convolutions_between(same):
    depthwise = timm.layers.Conv2dSame(32, 32, 3, stride=2, groups=32) if same else nn.Conv2d(32, 32, 3, groups=32)
    norms = [timm.layers.BatchNormAct2d(32, act_layer=nn.ReLU6) for _ in range(2)]
    layers = [BlockConv2d(ramanujan(32, 8, 4), 1), norms[0], depthwise, norms[1], BlockConv2d(ramanujan(8, 32, 4), 1)]
    folded = assert_folds(nn.Sequential(*layers), torch.randn(2, 8, 6, 6), 1)
    assert folded[0].layout.outputs.kind is Kind.IDENTITY
    layers[2] = nn.Conv2d(32, 32, 3, groups=16)
    assert_folds(nn.Sequential(*layers), torch.randn(2, 8, 6, 6), 0)


def _with_statistics(norm: nn.Module) -> nn.Module:
    for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.5, 2), ("bias", -1, 1)):
        if getattr(norm, name, None) is not None:
            nn.init.uniform_(getattr(norm, name), low, high)
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("conv", nn.BatchNorm2d(8)),
        ("conv", nn.BatchNorm2d(8, affine=False)),
        ("conv", timm.layers.BatchNormAct2d(8, act_layer=nn.Hardswish)),
        ("transposed", nn.BatchNorm2d(8)),
        ("linear", nn.BatchNorm1d(8)),
    ],
)
def test_norms_become_factors(kind, norm, layout, bias):
    topology, norm = LAYOUTS[layout](8, 12, 4), _with_statistics(copy.deepcopy(norm))
    layer = {
        "conv": lambda: BlockConv2d(topology, 3, bias=bias),
        "transposed": lambda: BlockConvTranspose2d(topology, 3, bias=bias),
        "linear": lambda: BlockLinear(topology, bias=bias),
    }[kind]()
    randomise(layer)
    net = nn.Sequential(layer, norm, nn.Tanh()).double().eval()
    x = torch.randn(3, 12, *(() if kind == "linear" else (5, 5)), dtype=torch.float64)
    y = net(x)
    assert fold_norms(net, x) == 1
    assert not isinstance(net[1], nn.modules.batchnorm._BatchNorm)
    torch.testing.assert_close(net(x), y)


@pytest.mark.parametrize("case", ["training", "read twice", "twice", "tokens", "tied", "no statistics", "hook"])
def test_norms_that_stay(case):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BlockLinear(interleaved(8, 8, 2))
            self.norm = nn.BatchNorm1d(8, track_running_stats=case != "no statistics")
            self.other = nn.BatchNorm1d(8)
            if case == "tied":
                self.other.weight = self.norm.weight

        def forward(self, x):
            y = self.layer(x)
            z = self.norm(y)
            return {"read twice": lambda: z + y, "twice": lambda: self.norm(z)}.get(case, lambda: z)()

    net = Net().eval()
    if case == "training":
        net.norm.train()
    if case == "hook":
        net.norm.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 8, 8) if case == "tokens" else torch.randn(3, 8)
    assert fold_norms(net, x) == 0
    assert isinstance(net.norm, nn.BatchNorm1d)


class Branch(nn.Module):
    """Hidden channels that are read twice, added to, reshaped or returned."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = BlockLinear(ramanujan(64, 16, 4)), BlockLinear(ramanujan(16, 64, 4))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        if self.how == "residual":
            return self.second(h) + h[..., :16]
        if self.how == "returned":
            return self.second(h), h
        if self.how == "scaled":
            return self.second(h * torch.arange(64.0, dtype=h.dtype))
        if self.how == "flipped":
            return self.second(h.flip(-1))
        if self.how == "twice":
            return self.second(h) + self.second(-h)
        if self.how == "softmax":
            return self.second(h.softmax(-1).cumsum(-1))
        if self.how == "tokens":
            return self.second(self.norm(h))
        self.kept = h
        return self.second(h)


HOWS = ["residual", "returned", "scaled", "flipped", "twice", "softmax", "kept"]


@pytest.mark.parametrize("how", HOWS)
def test_what_is_read_elsewhere_stays(how):
    model = Branch(how).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fold(model, torch.randn(2, 3, 16)) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_over_tokens_is_no_norm_over_channels():
    assert fold(Branch("tokens").eval(), torch.randn(2, 3, 16)) == 0


def test_shared_layers_and_parameters_stay():
    first, second = BlockLinear(ramanujan(16, 16, 4)), BlockLinear(ramanujan(16, 16, 4))
    assert fold(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), first), torch.randn(2, 16)) == 0
    second.blocks = first.blocks
    assert fold(nn.Sequential(first, nn.ReLU(), second), torch.randn(2, 16)) == 0


def test_uneven_blocks_stay():
    model = nn.Sequential(BlockLinear(ramanujan(30, 16, 4)), nn.ReLU(), BlockLinear(ramanujan(16, 30, 4)))
    assert_folds(model, torch.randn(2, 16), 0)


def test_sets_survive_a_state_dict():
    model = nn.Sequential(BlockLinear(ramanujan(64, 16, 4)), nn.Tanh(), BlockLinear(ramanujan(16, 64, 4)))
    x = torch.randn(5, 16)
    y = model(x)
    fold(model, x)
    other = nn.Sequential(BlockLinear(interleaved(64, 16, 4)), nn.Tanh(), BlockLinear(interleaved(16, 64, 4)))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), y)
    assert len(block_layers(other)) == 2
