"""How good a network is."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..data.dataset import IGNORED, Dataset, labelled
from .distributed import own_share, summed

_BATCH = 1000


def evaluate(model: nn.Module, data: Dataset) -> tuple[float, float]:
    """Accuracy (a fraction) and mean cross-entropy (nats) on the test set, in evaluation mode and full precision.

    Of sequences, over all steps that have a label. Where several processes train together each takes its share, and
    all get the whole's result.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 0, 1])
        >>> accuracy, loss = evaluate(torch.nn.Flatten(), Dataset("four", ("a", "b", "c", "d"), x, y, x, y))
        >>> accuracy, round(loss, 4)
        (0.75, 1.3863)
    """
    model.eval()
    x, y = data.test_x, data.test_y
    correct = torch.zeros((), dtype=torch.long, device=y.device)
    loss = torch.zeros((), dtype=torch.float64, device=y.device)
    with torch.no_grad():
        for images, labels in zip(own_share(x).split(_BATCH), own_share(y).split(_BATCH)):
            logits = model(data.standardise(images))
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    right, nats = summed(float(correct), float(loss), device=y.device)
    count = labelled(y)
    return right / count, nats / count
