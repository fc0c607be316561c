"""LipConvNet: 1-Lipschitz before and after training, so its certificates hold."""

import pytest
import torch

import sao_prune
from sao_prune import analysis
from sao_prune.models import LipConvNet, sao_lipconvnet
from sao_prune.nn import ECOConv2d, SkewConv2d


def digits(count):
    """Handwritten digits, 8 x 8, drawn 24 x 24; in [0, 1]."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 16
    return images.repeat_interleave(3, 2).repeat_interleave(3, 3), torch.tensor(data.target[:count])


def train(model, x, labels, steps):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(4 * model(x[batch]), labels[batch]).backward()
        optimizer.step()


def test_no_certified_sample_breaks_under_attack():
    x, labels = digits(700)
    model = LipConvNet(5, width=4, groups=2, in_chans=1, seed=0)
    train(model, x[:600], labels[:600], 30)
    x, labels = x[600:660], labels[600:660]
    certificate = analysis.certified_accuracy(model, x, labels)
    assert certificate.certified_accuracy > 0.5
    assert certificate.certified_accuracy <= certificate.accuracy
    for radius in (certificate.radius, 1.0):
        certified = analysis.certified_accuracy(model, x, labels, radius).certified
        attacked = analysis.pgd_l2(model, x, labels, radius, steps=20)
        assert (attacked - x).flatten(1).norm(dim=1).max() <= radius * 1.0001
        right = model.eval()(attacked).argmax(1) == labels
        assert right[certified].all()
    # The attack is worth something: at a large radius it breaks what is not certified.
    assert not right.all()
    spectrum = analysis.jacobian_spectrum(model, x[:2], method="exact")
    assert spectrum.largest <= 1 + 1e-4


def test_layers_are_those_of_the_table():
    model = sao_lipconvnet(depth=10, width=4, held=False)
    convolutions = [m for m in model.features if isinstance(m, (ECOConv2d, SkewConv2d))]
    assert [type(m) for m in convolutions] == [SkewConv2d] * 4 + [ECOConv2d] * 6
    assert [m.out_channels for m in convolutions] == [4, 8, 8, 16, 16, 32, 32, 64, 64, 128]
    assert all(m.exact_at(m.input_size) for m in convolutions[4:])
    assert model(torch.zeros(1, 3, 24, 24)).shape == (1, 10)


def test_timm_makes_it():
    timm = pytest.importorskip("timm")
    assert isinstance(timm.create_model("sao_lipconvnet", width=4, num_classes=7), LipConvNet)


def test_free_weights_can_be_pruned():
    model = LipConvNet(5, width=8, held=False, seed=0)
    report = sao_prune.apply(model, sparsity=0.75, method="lmp", seed=0)
    assert report.sparsity == pytest.approx(0.75, abs=0.01)
    assert model(torch.zeros(1, 3, 24, 24)).isfinite().all()
    model = LipConvNet(5, width=8, held=False, seed=0)
    sao_prune.apply(model, sparsity=0.75, method=sao_prune.SAO(conv="eco"), seed=0)
    eco = next(m for m in model.features if isinstance(m, ECOConv2d))
    size = (eco.in_channels, *eco.input_size)
    assert (analysis.singular_values(eco, size) - 1).abs().max() < 1e-5


def test_bad_arguments():
    for arguments, message in (
        ({"depth": 7}, "multiple of 5"),
        ({"width": 3}, "even number"),
        ({"img_size": 32}, "multiple of 24"),
        ({"groups": 0}, "positive"),
        ({"pretrained": True}, "pretrained"),
    ):
        with pytest.raises(ValueError, match=message):
            sao_lipconvnet(**arguments)
