"""The form in which blocks stay orthogonal while a network trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...orthogonality import hold, release
from ...replaced import StaleOptimizerWarning
from ..errors import LabError


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
