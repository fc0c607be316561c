"""scikit-learn's handwritten digits: 1797 images of 8 x 8 in 17 grey levels."""

from __future__ import annotations

import torch

from ..errors import DataError
from .raw import RawSet, array_part, resize
from .source import DataSource
from .split import stratified_split

_LEVELS = 16


def read_digits(name: str, size: int, source: DataSource) -> RawSet:
    """The digits, upsampled to ``size``; a fifth of every class, always the same, is the test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'sao-prune[lab]'") from error
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / _LEVELS)
    images, labels = resize(grey, size), torch.from_numpy(digits.target).long()
    train, test = stratified_split(labels, 0.2, seed=0)
    classes = tuple(str(i) for i in range(10))
    return RawSet(classes, 1, array_part(images[train], labels[train]), array_part(images[test], labels[test]))
