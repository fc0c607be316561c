"""Block convolutions of channels-last images, as implicit matrix products."""

from __future__ import annotations

from torch import Tensor

from .launch import Window
from .products import backward, forward
from .rest import pointwise
from .tables import side_of

_Pair = tuple[int, int]


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    outputs: Tensor,
    out_channels: int,
    stride: _Pair = (1, 1),
    padding: _Pair = (0, 0),
    dilation: _Pair = (1, 1),
    activation: str = "",
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A convolution with a block weight, zeros around the image.

    Args:
        x: shape ``(B, n, H, W)``, channels last.
        weight: shape ``(g, r, c, kh, kw)``, contiguous.
        bias: shape ``(out_channels,)`` or ``None``.
        inputs: the input channel of each of the ``g * c`` positions, int32; -1 where it is padding.
        outputs: the output channel of each of the ``g * r`` positions, int32; -1 where it is padding.
        out_channels: channels of the result; those that no position is are the activated bias.
        stride: vertical and horizontal; so ``padding`` and ``dilation``.
        activation: ``""``, ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        keep: return the derivative that `conv_backward` needs as well.

    Returns:
        The result, channels last, and what is kept, as of `linear_forward`.

    Raises:
        ValueError: an image smaller than the kernel, or a bad table.
    """
    window = Window((weight.shape[3], weight.shape[4]), stride, padding, dilation)
    height, width = window.result(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(f"an image of {x.shape[2]} x {x.shape[3]} pixels is smaller than {window}")
    ins, outs = side_of(inputs, weight.shape[0], x.shape[1]), side_of(outputs, weight.shape[0], out_channels)
    y = _image(x, (x.shape[0], out_channels, height, width))
    return forward(_last(x), weight, bias, y, ins, outs, window, activation, keep)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    needs: tuple[bool, bool, bool],
    stride: _Pair = (1, 1),
    padding: _Pair = (0, 0),
    dilation: _Pair = (1, 1),
    activation: str = "",
    saved: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv_forward`, with the arguments of `linear_backward`; that of ``x`` is channels last."""
    window = Window((weight.shape[3], weight.shape[4]), stride, padding, dilation)
    ins, outs = side_of(inputs, weight.shape[0], x.shape[1]), side_of(outputs, weight.shape[0], grad.shape[1])
    source = pointwise(_last(grad), saved, activation, _dense)
    return backward(source, x, weight, ins, outs, window, needs, lambda x: _image(x, tuple(x.shape)), _last)


def _image(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty channels-last image whose strides are dense even where a side has one element."""
    batch, channels, height, width = shape
    return like.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else _dense(x)


def _dense(x: Tensor) -> Tensor:
    # Not contiguous(memory_format=channels_last): with one pixel or one channel, that leaves strides as they are.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
