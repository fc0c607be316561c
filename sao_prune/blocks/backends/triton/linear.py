"""Block products of rows."""

from __future__ import annotations

from torch import Tensor

from .launch import Window
from .products import backward, forward
from .rest import pointwise
from .tables import side_of

_WINDOW = Window()


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    outputs: Tensor,
    out_features: int,
    activation: str = "",
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``act(x W^T + bias)`` for a block weight ``W``.

    Args:
        x: shape ``(N, n)``, rows anywhere.
        weight: shape ``(g, r, c)``, contiguous.
        bias: shape ``(out_features,)`` or ``None``.
        inputs: the input channel of each of the ``g * c`` positions, int32; -1 where it is padding.
        outputs: the output channel of each of the ``g * r`` positions, int32; -1 where it is padding.
        out_features: channels of the result; those that no position is are the activated bias.
        activation: ``""``, ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        keep: return the derivative that `linear_backward` needs as well.

    Returns:
        The result, contiguous, and with ``keep`` for GELU and SiLU the derivative of the activation; the gradients of
        the others need the result alone.

    Raises:
        ValueError: a table that is not int32, of another length, names a channel twice, or one that does not exist.
    """
    ins, outs = side_of(inputs, weight.shape[0], x.shape[1]), side_of(outputs, weight.shape[0], out_features)
    y = x.new_empty(x.shape[0], out_features)
    return forward(_rows(x), weight, bias, y, ins, outs, _WINDOW, activation, keep)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    needs: tuple[bool, bool, bool],
    activation: str = "",
    saved: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_forward`.

    Args:
        grad: gradient of the result, shape ``(N, out_features)``.
        x: as in `linear_forward`; so ``weight`` and the tables.
        needs: whether the gradients of ``x``, ``weight`` and the bias are asked for.
        activation: as in `linear_forward`.
        saved: for GELU and SiLU what `linear_forward` kept, for ReLU and tanh its result.

    Returns:
        The gradients of ``x``, ``weight`` and the bias, ``None`` where they are not asked for. The same operands give
        the same bits.
    """
    ins, outs = side_of(inputs, weight.shape[0], x.shape[1]), side_of(outputs, weight.shape[0], grad.shape[1])
    source = pointwise(_rows(grad), saved, activation, _rows)
    return backward(source, x, weight, ins, outs, _WINDOW, needs, lambda x: x.new_empty(x.shape), _rows)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
