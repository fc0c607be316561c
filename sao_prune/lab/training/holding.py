"""The form in which blocks stay orthogonal while a network trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...nn import ECOConv2d
from ...orthogonality import hold, release
from ...replaced import StaleOptimizerWarning
from ..errors import LabError


def check_holdable(model: nn.Module) -> None:
    """Find out, from its kinds of layers, whether anything of a network could be held.

    Raises:
        LabError: if it has only a classifier and convolutions with a kernel of their own, which drift.
    """
    kinds = (nn.Linear, nn.RNNBase, nn.MultiheadAttention)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    points = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1]
    eco = [module for module in model.modules() if isinstance(module, ECOConv2d)]
    if len(layers) + len(points) < 2 and not eco:
        raise LabError(
            f"hold: {type(model).__name__} has no layer but its classifier that can stay orthogonal; linear layers, "
            "1 x 1 and ECO convolutions can"
        )


@contextmanager
def held_form(model: nn.Module, wanted: bool) -> Iterator[str]:
    """Hold the blocks of a model (`sao_prune.hold`) for as long as the ``with`` lasts, if that is wanted.

    Yields:
        What was done, e.g. ``, 3 weights held``; empty if nothing is wanted.

    Raises:
        LabError: if there is nothing to hold.
    """
    if not wanted:
        yield ""
        return
    try:
        report = hold(model)
    except ValueError as error:
        raise LabError(f"hold: {error}") from error
    try:
        yield f", {len(report.held)} weights held"
    finally:
        with warnings.catch_warnings():
            # The training is over, and its optimizer with it.
            warnings.simplefilter("ignore", StaleOptimizerWarning)
            release(model)
