"""Attacks: exact on linear models, inside their ball, and each breaks what another cannot."""

import pytest
import torch
from torch import nn

from sao_prune.analysis import Threat, margins, pgd, random_search, worst_case


def linear():
    """Two classes of 1 x 4 x 4 images, their scores a plane through the grey image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    x = 0.5 + 0.1 * torch.randn(20, 1, 4, 4)
    model[1].weight.data -= model[1].weight.data.mean(1, keepdim=True)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_model_breaks_exactly_at_its_distance(norm, dual):
    model, x, labels = linear()
    across = model[1].weight[0] - model[1].weight[1]
    distances = margins(model(x), labels) / torch.linalg.vector_norm(across, dual)
    for factor, breaks in ((0.99, False), (1.03, True)):
        for index, distance in enumerate((distances * factor).tolist()):
            one, label = x[index : index + 1], labels[index : index + 1]
            moved = pgd(model, one, label, Threat(norm, distance, low=-9, high=9))
            assert bool(margins(model(moved), label) < 0) is breaks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_stay_in_the_ball_and_in_the_range_and_leave_the_model_as_it_was(norm):
    model, x, labels = linear()
    x, threat = (x + 0.4).clamp(0, 1), Threat(norm, 0.3)
    model.train()
    for attack in (pgd, random_search):
        moved = attack(model, x, labels, threat)
        assert torch.equal(moved, attack(model, x, labels, threat))
        far = (moved - x).flatten(1)
        assert (far.abs().amax(1) if norm == "linf" else far.norm(dim=1)).max() <= 0.3001
        assert 0 <= moved.min() <= moved.max() <= 1
        assert (margins(model(moved), labels) <= margins(model(x), labels)).all()
    assert model.training
    assert model[1].weight.requires_grad
    assert model[1].weight.grad is None


class Sure(nn.Module):
    """Scores so far apart that the softmax says exactly one and zero."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 1e6 * self.model(x)


class Rounded(Sure):
    """Scores in steps, flat almost everywhere."""

    def forward(self, x):
        return self.model((x * 20).round() / 20) + 0 * x.sum()


def test_the_margin_breaks_what_has_no_gradient_of_the_loss_and_the_search_what_has_none_at_all():
    model, x, labels = linear()
    threat = Threat("linf", 0.2)
    x = x.clamp(0, 1)
    plain = worst_case(model, x, labels, threat)
    assert plain.clean == 1
    assert plain.after["pgd"] == plain.worst < 0.5
    sure = worst_case(Sure(model), x, labels, threat)
    assert sure.after["pgd"] > plain.worst
    assert sure.after["margin"] == plain.worst
    rounded = worst_case(Rounded(model), x, labels, threat)
    assert rounded.after["margin"] > rounded.after["search"] == rounded.worst
    assert list(worst_case(model, x, labels, threat, queries=0).after) == ["pgd"]


def test_a_model_that_has_diverged_is_right_nowhere():
    x, labels = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    model[1].weight.data.fill_(torch.nan)
    found = worst_case(model, x, labels, Threat(), steps=2, queries=2)
    assert (found.clean, found.worst) == (0, 0)


def test_bad_input():
    model, x, labels = linear()
    for options in ({"norm": "l1"}, {"eps": -0.1}, {"eps": float("nan")}, {"low": 1.0, "high": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Threat(**options)
    with pytest.raises(ValueError, match="loss must be one of"):
        pgd(model, x, labels, Threat(), loss="hinge")
    with pytest.raises(ValueError, match="at least 1"):
        pgd(model, x, labels, Threat(), restarts=0)
    with pytest.raises(ValueError, match="images"):
        random_search(model[1], x.flatten(1), labels, Threat())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_inputs_outside_the_range_are_refused_instead_of_being_moved_into_it(norm):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x, labels = torch.randn(8, 1, 2, 2) * 3, torch.zeros(8, dtype=torch.long)
    threat = Threat(norm, 0.1)
    for attack in (pgd, random_search, worst_case):
        with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\], got .*standardise"):
            attack(net, x, labels, threat)
        with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\], got nan"):
            attack(net, torch.full_like(x, float("nan")), labels, threat)
    wide = Threat(norm, 0.1, low=float(x.min()), high=float(x.max()))
    assert worst_case(net, x, labels, wide, queries=5).worst <= 1
    assert worst_case(net, x[:0], labels[:0], threat, queries=5).right.numel() == 0
