"""LipConvNet-N: a convolutional network that is 1-Lipschitz by construction (thesis section 3.5.3.4, table 3.10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..nn import ECOConv2d, MaxMin, SkewConv2d
from ..orthogonality import hold
from ..seeds import Seed, base_seed, named_generator
from .classifier import ImageClassifier
from .registry import refuse_pretrained, register_model, without_timm_options

STRIDES = (2, 2, 2, 3, 1)
KERNELS = (3, 3, 3, 3, 1)
_SKEW_STAGES = 2


class LipConvNet(ImageClassifier):
    """Five stages of orthogonal convolutions, MaxMin after each, and a linear classifier.

    A stage has ``depth / 5 - 1`` convolutions of stride 1 and a strided one that doubles the width; the first two
    stages are skew orthogonal, the others ECO. With ``held`` every layer keeps its orthogonality during training, so
    the logits are a 1-Lipschitz function of the image and each row of the classifier has norm one: a prediction with
    margin ``m`` cannot change within ``m / sqrt(2)`` (`sao_prune.analysis.certified_accuracy`).

    Args:
        depth: convolutions in all, a multiple of 5.
        width: channels of the first stage.
        groups: blocks of every convolution but the first.
        held: parametrise ECO convolutions and the classifier; without it weights are free, as pruning needs them.
        img_size: a multiple of 24, so that every ECO kernel fits its input.
        seed: of topologies and values.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for a depth, width or image size that does not fit.

    Example:
        >>> import torch
        >>> LipConvNet(depth=5, width=4, seed=0)(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 5,
        width: int = 32,
        groups: int = 1,
        held: bool = True,
        num_classes: int = 10,
        img_size: int = 24,
        in_chans: int = 3,
        seed: Seed = None,
    ) -> None:
        super().__init__()
        _check(depth, width, groups, num_classes, img_size, in_chans)
        base = base_seed(seed)
        layers: list[nn.Module] = []
        channels, size = in_chans, img_size
        for stage, (stride, kernel) in enumerate(zip(STRIDES, KERNELS)):
            wide = width << stage
            for index in range(depth // 5):
                last = index == depth // 5 - 1
                out, step = (2 * wide, stride) if last else (wide, 1)
                blocks = groups if layers else 1
                own = int(named_generator(base, len(layers)).initial_seed())
                if stage < _SKEW_STAGES:
                    layers.append(SkewConv2d(channels, out, kernel, step, blocks, seed=own))
                else:
                    layers.append(ECOConv2d(channels, out, kernel, step, blocks, size, seed=own))
                layers.append(MaxMin())
                channels, size = out, size // step
        self.features = nn.Sequential(*layers)
        self.pool_size = size
        self.num_features = self.head_hidden_size = channels * size * size
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)
        generator = named_generator(base, "head")
        nn.init.orthogonal_(self.head.weight, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.held = held
        if held:
            hold(self.features)
            self._hold_head()
        self.pretrained_cfg = {
            "input_size": (in_chans, img_size, img_size),
            "num_classes": num_classes,
            "first_conv": "features.0",
            "classifier": "head",
        }

    def _hold_head(self) -> None:
        with torch.random.fork_rng(devices=[]):
            parametrizations.orthogonal(self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh orthogonal classifier for ``num_classes`` classes; 0 leaves the features as they are."""
        self.num_classes = num_classes
        if num_classes < 1:
            self.head = nn.Identity()
            return
        self.head = nn.Linear(self.num_features, num_classes)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.held:
            self._hold_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Flattened output of the last stage, shape ``(batch, num_features)``."""
        return self.features(x).flatten(1)  # type: ignore[no-any-return]

    def chain(self) -> list[nn.Module]:
        """Its layers in order: what `sao_prune.analysis.margin_constants` multiplies the bounds of."""
        return [*self.features, nn.Flatten(), self.head]


@register_model
def sao_lipconvnet(pretrained: bool = False, **options: Any) -> LipConvNet:
    """LipConvNet-N on 24 x 24 images.

    Args:
        pretrained: refused, there are no weights.
        **options: `LipConvNet`'s.

    Returns:
        The network, orthogonal from the start.

    Example:
        >>> len([m for m in sao_lipconvnet(depth=10, width=4).features if not isinstance(m, MaxMin)])
        10
    """
    refuse_pretrained("sao_lipconvnet", pretrained)
    return LipConvNet(**without_timm_options(options))


def _check(depth: int, width: int, groups: int, num_classes: int, img_size: int, in_chans: int) -> None:
    if depth < 5 or depth % 5:
        raise ValueError(f"depth must be a positive multiple of 5, got {depth}")
    if width < 2 or width % 2:
        raise ValueError(f"width must be an even number of at least 2 (MaxMin pairs channels up), got {width}")
    if img_size < 24 or img_size % 24:
        raise ValueError(
            f"img_size must be a multiple of 24, or the ECO kernels do not fit their inputs, got {img_size}"
        )
    if min(groups, num_classes, in_chans) < 1:
        raise ValueError(f"groups, num_classes and in_chans must be positive, got {groups}, {num_classes}, {in_chans}")
