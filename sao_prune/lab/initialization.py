"""Initial weights that other work starts residual networks without norms from."""

from __future__ import annotations

import torch
from torch import nn

from ..discovery.residual import find_residuals
from .errors import LabError


@torch.no_grad()
def he_(model: nn.Module, generator: torch.Generator) -> None:
    """He's normal initialisation of all linear layers and convolutions, in place; biases are zero.

    Args:
        model: the network.
        generator: of the values.

    Source: He et al., "Delving deep into rectifiers" (2015), https://arxiv.org/abs/1502.01852, backward form.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def fixup_(model: nn.Module, generator: torch.Generator) -> None:
    """Fixup, in place: He's values, branches scaled by how many and how deep they are, last layers zero.

    In a network of ``L`` residual blocks all layers of a branch of ``m`` but the last are multiplied by
    ``L ** (-1 / (2 m - 2))``, the last one and the classifier are zero. The scalar multipliers and biases that Fixup
    adds to the network are not added: convolutions without norms have biases of their own here.

    Args:
        model: a network with residual blocks and `timm`'s ``get_classifier``.
        generator: of the values.

    Raises:
        LabError: if the network has no residual block.

    Source: Zhang et al., "Fixup initialization" (2019), https://arxiv.org/abs/1901.09321.

    Example:
        >>> from sao_prune.models import sao_resnet
        >>> net = sao_resnet(depth=8, norm="none")
        >>> fixup_(net, torch.Generator().manual_seed(0))
        >>> bool(net.stages[0][0].conv2.weight.any()), bool(net.stages[0][0].conv1.weight.any())
        (False, True)
    """
    try:
        blocks = find_residuals(model).blocks
    except ValueError as error:
        raise LabError(f"init: fixup needs the residual blocks: {error}") from error
    if not blocks:
        raise LabError(f"init: fixup is for residual networks, and {type(model).__name__} has no residual block")
    he_(model, generator)
    for block in blocks:
        *others, last = (model.get_parameter(layer.weight) for layer in block.layers)
        for weight in others:
            weight.mul_(len(blocks) ** (-1 / (2 * len(others))))
        last.zero_()
    classifier = getattr(model, "get_classifier", lambda: None)()
    if isinstance(classifier, nn.Linear):
        classifier.weight.zero_()
