"""Which layers have a block form, how each is made, and the way back: one `Form` a kind of layer."""

from __future__ import annotations

from torch import nn

from ...discovery import PrunableWeight
from ..modules import BlockComposite, BlockModule
from .base import (
    Form,
    Given,
    Ineligible,
    gather,
    given_by,
    given_empty,
    given_of,
    parameter_of,
    read_topologies,
    weights_of,
)
from .composite import COMPOSITES, CompositeForm, stacked
from .single import LAYERS, LayerForm

# The first that suits a layer is its form.
FORMS: tuple[Form, ...] = (*LAYERS, *COMPOSITES)

__all__ = [
    "FORMS",
    "CompositeForm",
    "Form",
    "Given",
    "Ineligible",
    "LayerForm",
    "dense_form",
    "form_of",
    "gather",
    "given_by",
    "given_empty",
    "given_of",
    "parameter_of",
    "read_topologies",
    "record_of",
    "stacked",
    "weights_of",
]


def form_of(module: nn.Module) -> Form | None:
    """The form of a dense layer; ``None`` for other modules.

    Example:
        >>> type(form_of(nn.LSTM(2, 2))).__name__, form_of(nn.ReLU())
        ('RecurrentForm', None)
    """
    return next((form for form in FORMS if form.suits(module)), None)


def dense_form(module: BlockModule | BlockComposite, masked: bool | None = None) -> nn.Module:
    """The stock layer equivalent to a block layer, baked or masked; the block layer itself is not touched."""
    return _maker(module).dense(module, masked)


def record_of(module: BlockModule) -> PrunableWeight:
    """How the dense layer of a block layer stores its weight."""
    maker, shape, parts = _maker(module), module.weight_shape, module.parts
    transposed = isinstance(maker, LayerForm) and maker.transposed
    if transposed:
        shape = (shape[1] * parts, shape[0] // parts, *shape[2:])
    return PrunableWeight("", "weight", type(module).__name__, shape, parts, transposed)


def _maker(module: nn.Module) -> Form:
    stock = module.__dict__.get("_dense_class")
    if stock is not None:
        blank = stock.__new__(stock)
        nn.Module.__init__(blank)
        form = form_of(blank)
        if form is not None:
            return form
    return next(form for form in FORMS if type(module) is form.block_class)
