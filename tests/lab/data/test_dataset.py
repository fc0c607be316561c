"""A data set on the device: standardised as measured, split without a leak, handed out in batches."""

import numpy as np
import pytest
import torch

from sao_prune.lab.data import Dataset, load_dataset
from sao_prune.lab.errors import DataError


@pytest.fixture
def colourful() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([256, 128, 32]).reshape(3, 1, 1)
    x = (torch.rand(60, 3, 8, 8, generator=generator) * scale).byte()
    y = torch.arange(60) % 3
    return Dataset("colourful", ("a", "b", "c"), x[:40], y[:40], x[40:], y[40:])


def test_mean_and_deviation_are_those_of_every_channel(colourful: Dataset) -> None:
    values = colourful.train_x.numpy().astype(np.float64)
    assert colourful.mean == pytest.approx(values.mean((0, 2, 3)), rel=1e-12)
    assert colourful.std == pytest.approx(values.std((0, 2, 3)), rel=1e-12)
    x = colourful.standardise(colourful.train_x)
    assert x.dtype == torch.float32
    assert x.mean((0, 2, 3)).abs().max() < 1e-6
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_a_channel_of_one_value_becomes_zero() -> None:
    x = torch.full((4, 1, 2, 2), 7, dtype=torch.uint8)
    data = Dataset("flat", ("a",), x, torch.zeros(4).long(), x, torch.zeros(4).long())
    assert not data.standardise(x).any()


def test_standardising_leaves_the_bytes_alone_and_takes_one_image_too(colourful: Dataset) -> None:
    before = colourful.train_x.clone()
    x = colourful.standardise(colourful.train_x)
    assert torch.equal(colourful.train_x, before)
    assert torch.equal(colourful.standardise(colourful.train_x[3]), x[3])


def test_images_must_be_bytes(colourful: Dataset) -> None:
    with pytest.raises(TypeError, match="train_x must be uint8"):
        Dataset("x", ("a",), torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), colourful.test_x, colourful.test_y)


def test_a_batch_is_the_images_of_its_indices(colourful: Dataset) -> None:
    indices = torch.tensor([5, 0, 39])
    x, y = colourful.batch(indices)
    assert torch.equal(x, colourful.standardise(colourful.train_x)[indices])
    assert y.tolist() == [2, 0, 0]


def test_augmenting_keeps_labels_and_needs_a_generator(colourful: Dataset) -> None:
    indices = torch.arange(40)
    with pytest.raises(ValueError, match="crop, flip needs a generator"):
        colourful.batch(indices, ("crop", "flip"))
    x, y = colourful.batch(indices, ("crop", "flip"), torch.Generator().manual_seed(0))
    assert x.shape == (40, 3, 8, 8)
    assert x.dtype == torch.float32
    assert torch.equal(y, colourful.train_y)


def test_holdout_takes_from_the_training_set_and_never_touches_the_test_set() -> None:
    full = load_dataset("digits")
    held = full.holdout(0.2)
    assert len(held.train_y) + len(held.test_y) == len(full.train_y)
    rows = {bytes(image) for image in full.train_x.numpy()}
    assert all(bytes(image) in rows for image in held.test_x.numpy())
    assert torch.equal(held.test_y.bincount(), (full.train_y.bincount() * 0.2).round().long())
    assert (held.mean, held.std) == (full.mean, full.std)


def test_a_holdout_that_empties_a_class_is_refused(colourful: Dataset) -> None:
    with pytest.raises(DataError, match="too few to hold out 1%"):
        colourful.holdout(0.01)


def test_another_device_has_the_same_set(colourful: Dataset) -> None:
    there = colourful.to("meta")
    assert there.device.type == there.test_y.device.type == "meta"
    assert (there.mean, there.classes, there.image_shape) == (colourful.mean, colourful.classes, (3, 8, 8))
