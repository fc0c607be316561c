"""The search for scores leaves the model as it is: after a failure altogether, after success but for the masks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import SNIP, GraSP, SynFlow

from .cases import mlp


class Mixed(nn.Module):
    """Grouped convolution, batch norm, attention, recurrence, tied weights, dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.grouped(torch.relu(self.norm(self.stem(x)))).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.drop(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return self.head(self.lstm(x)[0].mean(1))


def images(n=6):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 4


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
        "asked": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def used_model():
    torch.manual_seed(0)
    model = Mixed()
    x, y = images()
    F.cross_entropy(model(x), y).backward()
    model.norm.eval()
    model.lstm.weight_ih_l0.requires_grad_(False)
    return model


def no_number(outputs, targets):
    return outputs.sum() * float("nan")


def second_fails():
    calls = []

    def loss(outputs, targets):
        calls.append(len(targets))
        if len(calls) > 1:
            raise RuntimeError("the second chunk fails")
        return F.cross_entropy(outputs, targets)

    return loss


X, Y = images()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SNIP(), r"SNIP needs data: method=sao_prune\.SNIP\(inputs=x, targets=y\)"),
        (GraSP(), "GraSP needs data"),
        (SNIP(inputs=X, targets=Y, loss=no_number), "the loss is nan"),
        (SNIP(inputs=X, targets=Y, batch_size=2, loss=second_fails()), "no loss on a chunk of 2 examples: the second"),
        (GraSP(inputs=X, targets=Y, batch_size=2, loss=second_fails()), "no loss on a chunk of 2 examples: the second"),
        (SNIP(inputs=X, targets=Y + 7), "no loss on a chunk of 6 examples: Target"),
        (SNIP(inputs=X[:, :2], targets=Y), "no loss on a chunk"),
        (SNIP(inputs=X, targets=Y, loss=lambda out, y: out), r"must give one number.* got \(6, 4\)"),
        (GraSP(inputs=X, targets=Y, loss=lambda out, y: out.sum()), r"no gradient reaches .*so there is nothing"),
        (SynFlow(), "does not know the input shape of Mixed"),
        (SynFlow(inputs=X[:, :2]), r"does not run on an input of shape \(1, 2, 4, 4\)"),
    ],
)
def test_after_a_failure_the_model_is_as_it_was(method, message):
    model = used_model() if "no gradient" not in message else mlp(3, 3, 3, 3)
    if "no gradient" in message:
        method = GraSP(inputs=torch.ones(2, 3), targets=torch.ones(2), loss=lambda out, y: out.sum() * 0.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sao_prune.apply(model, sparsity=0.5, method=method, seed=0)
    assert same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
@pytest.mark.parametrize("method", [SNIP(inputs=X, targets=Y), GraSP(inputs=X, targets=Y), SynFlow(3, inputs=X)])
def test_all_kinds_of_layers_and_nothing_else_changes(method):
    model = used_model()
    before = snapshot(model)
    report = sao_prune.apply(model, sparsity=0.6, method=method, seed=0)
    assert {r.name for r in report.pruned} >= {"grouped.weight", "attention.in_proj_weight", "lstm.weight_hh_l0"}
    assert report.sparsity == pytest.approx(0.6, abs=0.02)
    assert torch.equal(model.norm.running_mean, before["state"]["norm.running_mean"])
    assert model.norm.training is False
    assert torch.equal(model.one.weight_orig, before["state"]["one.weight"])
    assert model.one.weight_orig is model.two.weight_orig
    assert same([p is None for p in before["grads"]], [p.grad is None for p in model.parameters()])
    assert torch.equal(torch.get_rng_state(), before["random"])
    F.cross_entropy(model(X), Y).backward()
