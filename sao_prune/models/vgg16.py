"""VGG-16 with batch normalisation, on 36 x 36 images (thesis table 3.11)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .classifier import ImageClassifier, global_pool
from .options import check_img_size, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options

# Of each stage: convolutions, channels in units of the first stage's, kernel and stride of the pooling after it.
STAGES = ((2, 1, 2), (2, 2, 2), (3, 4, 1), (3, 8, 3), (3, 8, 3))


class SaoVGG(ImageClassifier):
    """Thirteen 3 x 3 convolutions with batch norm and ReLU, in five stages, then three linear layers.

    The pools are those that the table's sizes ask for: 36, halved to 18 and 9, not pooled after the third stage, then
    a third of it twice: 3 and 1. So the last six convolutions work on 9 x 9 and 3 x 3, where ECO kernels of 3 fit.
    The linear layers are 512-256-128-classes with ReLU between them; only the last of them is the classifier that
    pruning leaves dense. A multiple of 36 leaves more than one position, over which the mean is taken.

    Args:
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        img_size: a multiple of 36.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for a size below one or an image size that is no multiple of 36.

    Example:
        >>> import torch
        >>> net = SaoVGG(width=4).eval()
        >>> x = torch.zeros(1, 3, 36, 36)
        >>> net.forward_features(x).shape, net(x).shape
        (torch.Size([1, 32, 1, 1]), torch.Size([1, 10]))
    """

    def __init__(self, width: int = 64, num_classes: int = 10, in_chans: int = 3, img_size: int = 36) -> None:
        super().__init__()
        check_sizes(width=width, in_chans=in_chans)
        check_img_size(img_size, "its pools are 2, 2, 3 and 3", multiple=36)
        layers: list[nn.Module] = []
        channels = in_chans
        for count, factor, pool in STAGES:
            for _ in range(count):
                conv = nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)
                channels = factor * width
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
        self.features = nn.Sequential(*layers)
        self.pool = global_pool()
        self.hidden = nn.Sequential(
            nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 2 * width), nn.ReLU()
        )
        self.add_head(8 * width, num_classes, (in_chans, img_size, img_size), "features.0", hidden=2 * width)

    def forward_features(self, x: Tensor) -> Tensor:
        """Output of the last stage, shape ``(batch, 8 * width, h, h)``."""
        return self.features(x)  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor:
        """Output of the second linear layer and its ReLU, shape ``(batch, 2 * width)``."""
        return self.hidden(self.pool(features))  # type: ignore[no-any-return]


@register_model
def sao_vgg16(pretrained: bool = False, **options: Any) -> SaoVGG:
    """VGG-16 with batch normalisation on 36 x 36 images (thesis table 3.11).

    Args:
        pretrained: refused, there are no weights.
        **options: `SaoVGG`'s.

    Returns:
        The network, with the weights that torch draws.

    Example:
        >>> sum(p.numel() for p in sao_vgg16().parameters() if p.dim() > 1)
        14875584
    """
    refuse_pretrained("sao_vgg16", pretrained)
    return SaoVGG(**without_timm_options(options))
