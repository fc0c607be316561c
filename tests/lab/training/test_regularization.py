"""Mixed batches and softened labels."""

import pytest
import torch
from torch.nn import functional as F

from sao_prune.lab.training import TrainSpec
from sao_prune.lab.training.regularization import Objective


def objective(**options: float) -> Objective:
    return Objective(TrainSpec(epochs=1, batch_size=8, **options), classes=4)


def test_off_means_plain_cross_entropy() -> None:
    plain, x, y, logits = objective(), torch.rand(4, 1, 2, 2), torch.arange(4), torch.randn(4, 4)
    same_x, same_y = plain.mix(x, y, torch.Generator())
    assert same_x is x
    assert same_y is y
    assert float(plain.loss(logits, y)) == pytest.approx(4 * float(F.cross_entropy(logits, y)), rel=1e-6)


def test_label_smoothing_is_torchs_with_and_without_mixing() -> None:
    logits, y = torch.randn(4, 4), torch.arange(4)
    expected = float(F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.1))
    assert float(objective(label_smoothing=0.1).loss(logits, y)) == pytest.approx(expected, rel=1e-6)
    rarely = objective(label_smoothing=0.1, cutmix=1e-12)
    _, target = rarely.mix(torch.rand(4, 1, 2, 2), y, torch.Generator().manual_seed(0))
    assert float(rarely.loss(logits, target)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [8, 7, 1])
def test_cutmix_weights_labels_by_the_pixels_that_each_image_has(count: int) -> None:
    always, generator = objective(cutmix=1.0), torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    for _ in range(20):
        x = y.float().reshape(-1, 1, 1, 1).expand(count, 1, 16, 16).clone()
        mixed, target = always.mix(x, y, generator)
        pixels = torch.stack([(mixed == label).float().mean((1, 2, 3)) for label in range(4)], 1)
        assert torch.allclose(target, pixels, atol=1e-6)


def test_mixup_weights_labels_as_it_blends_images() -> None:
    always, generator = objective(mixup=1.0), torch.Generator().manual_seed(0)
    y = torch.arange(8) % 4
    mixed, target = always.mix(F.one_hot(y, 4).float().reshape(8, 1, 2, 2).clone(), y, generator)
    assert torch.allclose(mixed.flatten(1), target, atol=1e-6)
    assert 0 < float(target[0, 0]) < 1


def test_cutmix_comes_with_its_probability() -> None:
    half, generator = objective(cutmix=0.5), torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1])
    mixed = sum(bool((half.mix(torch.rand(2, 1, 32, 32), y, generator)[1] % 1 != 0).any()) for _ in range(400))
    assert 150 < mixed < 230


def test_mixing_depends_on_the_generator_alone() -> None:
    mixing, y = objective(cutmix=0.5, mixup=0.5), torch.arange(8) % 4
    x = torch.rand(8, 1, 8, 8)
    one, two, other = (mixing.mix(x.clone(), y, torch.Generator().manual_seed(s))[1] for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
