"""scikit-learn's handwritten digits: 1797 images of 8 x 8 in 17 grey levels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .raw import RawSet, array_part, resize
from .source import DataSource
from .split import stratified_split

_LEVELS = 16


def read_digits(name: str, size: int, source: DataSource) -> RawSet:
    """The digits, upsampled to ``size``; a fifth of every class, always the same, is the test part."""
    pixels, target = _read_table()
    grey = torch.from_numpy(pixels).float().unsqueeze(1) * (255 / _LEVELS)
    images, labels = resize(grey, size), torch.from_numpy(target).long()
    train, test = stratified_split(labels, 0.2, seed=0)
    classes = tuple(str(i) for i in range(10))
    return RawSet(classes, 1, array_part(images[train], labels[train]), array_part(images[test], labels[test]))


def _read_table() -> tuple[np.ndarray, np.ndarray]:
    """Images ``(1797, 8, 8)`` and labels, from the file that comes with scikit-learn."""
    library = find_spec("sklearn")
    if library is None or library.origin is None:
        raise DataError("the digits come with scikit-learn: pip install 'sao-prune[lab]'")
    file = Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target
    # Read without the library, whose import takes longer than a small training.
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
