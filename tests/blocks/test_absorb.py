"""Orders of neighbouring layers are folded where nobody else sees them, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import BlockModule


def _compact(model: nn.Module, groups: int = 4, topology: str = "ramanujan") -> list[BlockModule]:
    method = sao_prune.SAO(topology=topology, variant=3)
    sao_prune.apply(model, groups=groups, method=method, seed=0, skip_first=False, skip_last=False)
    reference = copy.deepcopy(model)
    x = torch.randn(6, *getattr(model, "shape", (16,)))
    sao_prune.compact(model)
    for mode in (True, False):
        for m in (model, reference):
            m.train(mode)
            torch.manual_seed(1)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.manual_seed(1)
        y = model(ours)
        torch.manual_seed(1)
        expected = reference(theirs)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    return [m for m in model.modules() if isinstance(m, BlockModule)]


def test_linear_stack_runs_features_first_and_leaves_in_rows():
    model = nn.Sequential(
        nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.0), nn.Linear(32, 32)
    )
    first, second, last = _compact(model)
    assert (first.features_first, second.features_first, last.features_first) == (True, True, False)
    # Random rows of the first meet random columns of the second: one gather instead of two.
    assert first.packing.raw
    assert second.folded[0] is not None
    assert model(torch.randn(6, 16)).is_contiguous()


@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_convolutions_fold_through_pooling(topology):
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.0),
        nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(128, 8),
    )  # fmt: skip
    model.shape = (16, 10, 10)
    layers = _compact(model, groups=4, topology=topology)
    assert layers[0].packing.raw == (topology == "ramanujan")
    assert not layers[1].packing.raw


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(16, 64), nn.Linear(64, 16), nn.GELU()

    def forward(self, x):
        return x + self.b(self.act(self.a(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(torch.tanh(self.b(self.a(self.a(x)))))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.gate = Residual(), nn.Linear(16, 16)

    def forward(self, x):
        if x.sum() > 0:
            return self.gate(self.net(x))
        return self.net(self.gate(x))


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        h = self.a(x)
        return self.b(h.relu()) + h[:, :16]


class Softmaxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(64)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).softmax(-1))


@pytest.mark.parametrize("make", [Residual, Twice, Branching, Peeking, Softmaxed])
@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_orders_stay_natural_where_others_look(make, topology):
    layers = _compact(make(), topology=topology)
    if make in (Twice, Peeking, Softmaxed):
        assert not any(layer.packing.raw for layer in layers)


def test_submodules_are_traced_where_the_whole_cannot_be():
    layers = _compact(Branching())
    assert [layer.features_first for layer in layers] == [True, False, None]


def test_folded_layers_refuse_another_topology():
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    _compact(model)
    state = copy.deepcopy(model.state_dict())
    state["0.row_set"] = state["0.row_set"].flip(0)
    with pytest.raises(RuntimeError, match=r"sao_prune\.load"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="folded"):
        model[0].run_as(model[0].execution)
