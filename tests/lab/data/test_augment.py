"""Augmentation: what each may do to an image, drawn for every image alone, from the generator alone."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from sao_prune.lab.data.augment import AUGMENTATIONS, POLICY_CHUNK, augment, auto_augment, random_crop, random_flip

ALL = [(choice,) for choice in AUGMENTATIONS] + [AUGMENTATIONS]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    """Every image the same, so that differences are the augmentation's; no pixel black, no two equal in a row."""
    one = torch.randint(1, 256, (1, channels, size, size), generator=generator(9), dtype=torch.uint8)
    return one.expand(count, -1, -1, -1).clone()


def test_a_crop_is_a_window_of_the_padded_image_and_every_window_comes_up_equally_often() -> None:
    count = 81 * 100
    x = images(count, channels=1, size=5)
    windows = F.pad(x[0, 0], [4] * 4).unfold(0, 5, 1).unfold(1, 5, 1).reshape(81, 25)
    which = (random_crop(x, generator()).reshape(count, 1, 25) == windows).all(-1)
    assert torch.equal(which.sum(1), torch.ones(count).long())
    seen = which.sum(0)
    assert float(((seen - 100) ** 2 / 100).sum()) < 125  # 99.9 % of a chi-squared with 80 degrees of freedom
    assert which[:, 40].any()


def test_channels_are_cropped_together() -> None:
    x = images(50)
    cropped = random_crop(x, generator())
    for channel in range(3):
        alone = random_crop(x[:, channel : channel + 1], generator())
        assert torch.equal(cropped[:, channel : channel + 1], alone)


def test_a_flip_is_all_or_nothing_for_every_image() -> None:
    x = images(1000)
    flipped = random_flip(x, generator())
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    same = (flipped == x).flatten(1).all(1)
    assert torch.equal(mirrored, ~same)
    assert 430 < int(mirrored.sum()) < 570


def test_the_policy_is_torchvisions_with_a_draw_of_its_own_for_every_few_images() -> None:
    x = images(20 * POLICY_CHUNK)
    changed = auto_augment(x, generator())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator())))
        expected = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)(x[:POLICY_CHUNK])
    assert torch.equal(changed[:POLICY_CHUNK], expected)
    assert len({bytes(image) for image in changed.numpy()}) > 5


@pytest.mark.parametrize("choices", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_stay_bytes_of_the_same_shape_and_the_original_is_left_alone(
    choices: tuple[str, ...], channels: int
) -> None:
    x = images(70, channels)
    before = x.clone()
    changed = augment(x, choices, generator())
    assert (changed.dtype, changed.shape) == (torch.uint8, x.shape)
    assert torch.equal(x, before)
    assert not torch.equal(changed, x)


@pytest.mark.parametrize("choices", ALL)
def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(choices: tuple[str, ...]) -> None:
    x = images(70)
    state = torch.get_rng_state()
    one = augment(x, choices, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(augment(x, choices, generator(1)), one)
    assert not torch.equal(augment(x, choices, generator(2)), one)
    torch.set_rng_state(state)


def test_the_order_of_the_choices_does_not_matter() -> None:
    x = images(30)
    assert torch.equal(augment(x, ("flip", "crop"), generator()), augment(x, ("crop", "flip"), generator()))


@pytest.mark.parametrize("choices", ALL)
def test_one_generator_serves_batch_after_batch_with_new_draws(choices: tuple[str, ...]) -> None:
    x, source = images(30), generator()
    assert not torch.equal(augment(x, choices, source), augment(x, choices, source))
