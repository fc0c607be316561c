"""Residual networks for small images: ResNet-20 to 56 and ResNet-18 (thesis tables 3.12 and 3.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier, global_pool
from .options import check_choice, check_img_size, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options

SHORTCUTS = ("pad", "projection")
NORMS = ("batch", "none")


class PadShortcut(nn.Module):
    """Option A of He et al. (2016): every ``stride``-th position, and zero channels on both sides; no parameters."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (fan_out - fan_in) // 2
        self.after = fan_out - fan_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BranchScale(nn.Module):
    """One trainable factor at the end of a residual branch: SkipInit (De and Smith, 2020), ReZero."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input, then ReLU; convolutions have biases where there is no norm."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        stride: int,
        shortcut: str,
        norm: str = "batch",
        branch_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=norm == "none")
        self.bn1 = _norm(norm, fan_out)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=norm == "none")
        self.bn2 = _norm(norm, fan_out)
        self.scale = nn.Identity() if branch_scale is None else BranchScale(branch_scale)
        self.shortcut = _shortcut(fan_in, fan_out, stride, shortcut, norm)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.scale(self.bn2(self.conv2(h))) + self.shortcut(x))  # type: ignore[no-any-return]


class SaoResNet(ImageClassifier):
    """A 3 x 3 convolution, stages of residual blocks, the mean over positions, a linear classifier.

    Every stage but the first halves the image and doubles the width.

    Args:
        blocks: residual blocks of each stage, two convolutions each.
        width: channels of the first stage.
        shortcut: where a block changes the size, ``"pad"`` subsamples and adds zero channels without any parameter
            (option A of He et al., 2016), ``"projection"`` has a 1 x 1 convolution and batch norm (option B).
        norm: ``"batch"``, or ``"none"``: no norms, and biases in the convolutions instead.
        branch_scale: initial value of one trainable factor at the end of every branch; 0 makes SkipInit of He's
            initialisation without norms (De and Smith, https://arxiv.org/abs/2002.10444). ``None``: no such factor.
        img_size: at least ``2 ** (stages - 1)``.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for a size below one, an unknown shortcut or norm, no stage, or an image that is too small.

    Example:
        >>> import torch
        >>> net = SaoResNet(blocks=(1, 1, 1), width=4).eval()
        >>> x = torch.zeros(1, 3, 36, 36)
        >>> net.forward_features(x).shape, net(x).shape
        (torch.Size([1, 16, 9, 9]), torch.Size([1, 10]))
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 3),
        width: int = 16,
        shortcut: str = "pad",
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        norm: str = "batch",
        branch_scale: float | None = None,
    ) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks must name at least one stage, got none")
        check_sizes(**{f"blocks[{stage}]": count for stage, count in enumerate(blocks)})
        check_sizes(width=width, in_chans=in_chans)
        check_choice("shortcut", shortcut, SHORTCUTS)
        check_choice("norm", norm, NORMS)
        halvings = len(blocks) - 1
        check_img_size(img_size, f"it is halved {halvings} times", ge=2**halvings)
        self.stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=norm == "none")
        self.bn = _norm(norm, width)
        self.act = nn.ReLU()
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            stages.append(_stage(channels, width << stage, count, 1 if stage == 0 else 2, shortcut, norm, branch_scale))
            channels = width << stage
        self.stages = nn.Sequential(*stages)
        self.pool = global_pool()
        self.add_head(channels, num_classes, (in_chans, img_size, img_size), "stem")

    def forward_features(self, x: Tensor) -> Tensor:
        """Output of the last stage, shape ``(batch, num_features, h, h)``."""
        return self.stages(self.act(self.bn(self.stem(x))))  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor:
        """The mean over positions, shape ``(batch, num_features)``."""
        return self.pool(features)  # type: ignore[no-any-return]


@register_model
def sao_resnet(pretrained: bool = False, depth: int = 20, **options: Any) -> SaoResNet:
    """CIFAR ResNet-N of He et al. (2016): stages of 16, 32 and 64 channels with parameter-free shortcuts.

    The rows of thesis table 3.12 do not add up to N layers; this is the network that its text refers to, with N
    weight layers: the first convolution, ``(N - 2) / 6`` blocks in each of three stages and the classifier. Images of
    36 x 36 (the thesis's for ECO) leave 9 x 9 for the last stage, where ECO kernels of 3 fit.

    Args:
        pretrained: refused, there are no weights.
        depth: N = 6 n + 2; the thesis has 20, 32, 44 and 56.
        **options: `SaoResNet`'s, but ``blocks``.

    Returns:
        The network, with the weights that torch draws.

    Raises:
        ValueError: for any other depth.

    Example:
        >>> sum(p.numel() for p in sao_resnet(depth=20).parameters())
        269722
    """
    refuse_pretrained("sao_resnet", pretrained)
    check_sizes(depth=depth)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6 n + 2 with n of at least 1 (8, 14, 20, 26, 32, ..), got {depth}")
    if "blocks" in options:
        raise ValueError("sao_resnet has its blocks from depth; for others build sao_prune.models.SaoResNet")
    return SaoResNet(blocks=((depth - 2) // 6,) * 3, **without_timm_options(options))


@register_model
def sao_resnet18(pretrained: bool = False, num_classes: int = 100, **options: Any) -> SaoResNet:
    """ResNet-18 for 32 x 32 images: 3 x 3 first convolution, no max pool, 64-128-256-512 channels.

    Thesis table 3.13 has 18 weight layers and no 1 x 1 convolution, which is option A of He et al. (2016), with which
    they first present it; ``shortcut="projection"`` makes the more usual form with three 1 x 1 convolutions. The
    table's classifier of 64 inputs is a slip: the last stage has 512 channels.

    Args:
        pretrained: refused, there are no weights.
        num_classes: the thesis trains it on CIFAR-100.
        **options: `SaoResNet`'s, but ``blocks``; ``width`` is 64 here.

    Returns:
        The network, with the weights that torch draws.

    Raises:
        ValueError: if another number of blocks is asked for.

    Example:
        >>> sum(p.numel() for p in sao_resnet18(shortcut="projection").parameters())
        11220132
    """
    refuse_pretrained("sao_resnet18", pretrained)
    if "blocks" in options:
        raise ValueError("sao_resnet18 has two blocks a stage; for others build sao_prune.models.SaoResNet")
    chosen = {"width": 64, **without_timm_options(options)}
    return SaoResNet(blocks=(2, 2, 2, 2), num_classes=num_classes, **chosen)


def _norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.Identity()


def _shortcut(fan_in: int, fan_out: int, stride: int, kind: str, norm: str) -> nn.Module:
    if fan_in == fan_out and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(fan_in, fan_out, stride)
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=norm == "none"), _norm(norm, fan_out))


def _stage(
    fan_in: int, fan_out: int, count: int, stride: int, shortcut: str, norm: str, branch_scale: float | None
) -> nn.Sequential:
    first = ResidualBlock(fan_in, fan_out, stride, shortcut, norm, branch_scale)
    rest = (ResidualBlock(fan_out, fan_out, 1, shortcut, norm, branch_scale) for _ in range(count - 1))
    return nn.Sequential(first, *rest)
