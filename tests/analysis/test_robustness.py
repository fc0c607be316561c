"""Certificates by hand, and the attack against the exact answer for a linear model."""

import pytest
import torch

from sao_prune import analysis


def test_the_radius_of_an_orthogonal_linear_classifier_is_exact():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2, bias=False)
    torch.nn.init.orthogonal_(model.weight)
    x = torch.randn(20, 6)
    model.requires_grad_(False)
    labels = model(x).argmax(1)
    radii = analysis.certified_radii(model(x), labels)
    for factor, holds in ((0.99, True), (1.01, False)):
        for index in range(20):
            moved = analysis.pgd_l2(
                model, x[index : index + 1], labels[index : index + 1], factor * float(radii[index])
            )
            assert bool(model(moved).argmax(1) == labels[index]) is holds


def test_wrong_predictions_are_never_certified():
    certificate = analysis.certified_accuracy(torch.nn.Identity(), torch.eye(2), torch.tensor([0, 0]), radius=0.0)
    assert certificate.certified.tolist() == [True, False]
    assert certificate.accuracy == certificate.certified_accuracy == 0.5


def test_a_larger_lipschitz_constant_certifies_less():
    logits, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert analysis.certified_radii(logits, labels, 2.0) == analysis.certified_radii(logits, labels) / 2


def test_bad_input():
    with pytest.raises(ValueError, match="radius"):
        analysis.certified_accuracy(torch.nn.Identity(), torch.eye(2), torch.tensor([0, 1]), radius=-1.0)
    for constant in (0.0, float("nan"), torch.full((2, 2), -1.0), torch.ones(3, 3)):
        with pytest.raises(ValueError, match="lipschitz"):
            analysis.certified_radii(torch.eye(2), torch.tensor([0, 1]), constant)


@pytest.mark.parametrize("lipschitz", [1.0, torch.tensor(1.0), torch.ones(3, 3)], ids=["number", "scalar", "matrix"])
def test_logits_that_are_not_finite_certify_nothing(lipschitz):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[inf, 0.0, 1.0], [2.0, -inf, 1.0], [nan, 0.0, 1.0], [2.0, nan, 1.0], [3.0, 0.0, 1.0]])
    radii = analysis.certified_radii(logits, torch.zeros(5, dtype=torch.long), lipschitz)
    assert radii[:4].tolist() == [0, 0, 0, 0]
    assert radii[4] > 0


def test_a_bound_is_taken_as_it_is_given():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    bound, logits, labels = analysis.lipschitz_bound(net), torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    expected = analysis.certified_radii(logits, labels, float(bound))
    assert torch.allclose(analysis.certified_radii(logits, labels, bound), expected)
    for bad in (0.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match="lipschitz must be positive"):
            analysis.certified_radii(logits, labels, torch.tensor(bad))
