"""The form in which a network is trained: masked, or compact where its layers are made of blocks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ...blocks import BlockModule, compact, expand
from ...replaced import StaleOptimizerWarning

# Below so many weights a linear layer's masked product costs less than the steps around its blocks.
_SMALL = 200 * 200


@contextmanager
def execution_form(model: nn.Module, execution: str, example: Tensor) -> Iterator[str]:
    """Give a masked model the form that ``execution`` asks for; when the ``with`` ends, it is masked again.

    Layers whose masks have no blocks (magnitude, random) stay masked, and a model that is compact already stays so.
    ``auto`` follows a rule and measures nothing, since a choice that hangs on timings could round differently in the
    next run: compact, but for networks whose masked layers are all linear and small (below 200 x 200 on average).
    ``benchmarks/execution.py`` has the measurements behind it, which were made on one CPU core.

    Args:
        execution: as in `TrainSpec`.
        example: one small batch of images, to see that the compact model computes the same.

    Yields:
        What was done, e.g. ``compact: 48 of 51 layers``, ``masked`` or ``dense``.
    """
    masked = _masks(model)
    given = sum(isinstance(module, BlockModule) for module in model.modules())
    if given:
        yield f"compact: {given} layers, as given"
    elif not masked:
        yield "dense"
    elif execution == "masked" or (execution == "auto" and _is_small(masked)):
        yield "masked"
    else:
        text = _make_compact(model, masked, example)
        try:
            yield text
        finally:
            if any(isinstance(module, BlockModule) for module in model.modules()):
                with warnings.catch_warnings():
                    # The training is over, and its optimizer with it.
                    warnings.simplefilter("ignore", StaleOptimizerWarning)
                    expand(model)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """By what `compact` calls their layers: a module's name, with that of the parameter where it is no ``weight``."""
    return {
        name.removesuffix("_mask").removesuffix(".weight"): mask
        for name, mask in model.named_buffers()
        if name.endswith("_mask")
    }


def _is_small(masks: Mapping[str, Tensor]) -> bool:
    weights = [mask.numel() for mask in masks.values() if mask.dim() == 2]
    return len(weights) == len(masks) and sum(weights) < _SMALL * len(weights)


def _make_compact(model: nn.Module, masked: Collection[str], example: Tensor) -> str:
    mode = model.training
    # Verified in double precision: a thousand layers may blow the rounding of single precision up to another answer.
    model.eval().double()
    try:
        report = compact(model, example_input=example.double() if example.is_floating_point() else example)
    except ValueError as error:
        return f"masked ({' '.join(str(error).split())})"
    finally:
        model.float().train(mode)
    if any(record.name not in masked for record in report.compact):
        # Zeros without a mask are trained like any other value; a compact layer would hold them at zero.
        expand(model)
        return "masked (some layers have blocks of zeros without a mask)"
    return f"compact: {len(report.compact)} of {len(report.layers)} layers"
