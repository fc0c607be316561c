"""What is left beside the kernels: channels in no group, and the derivative of the activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Source

_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda h: h,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def pointwise(grad: Tensor, saved: Tensor | None, activation: str, dense: Callable[[Tensor], Tensor]) -> Source:
    """A gradient and what its activation left.

    Raises:
        ValueError: an activation without what it left.
    """
    if not activation:
        return Source(grad)
    if saved is None:
        raise ValueError(f"the gradient through {activation} needs what the forward pass kept, or its result")
    kind = activation if activation in ("relu", "tanh") else "kept"
    return Source(grad, dense(saved).contiguous() if saved.dim() == 2 else dense(saved), kind)


def fill_missing(y: Tensor, saved: Tensor | None, bias: Tensor | None, missing: Tensor | None, activation: str) -> None:
    """Channels that no position is: the bias, activated."""
    if missing is None:
        return
    h = y.new_zeros(len(missing)) if bias is None else bias[missing]
    shape = (-1,) + (1,) * (y.dim() - 2)
    y[:, missing] = _ACTIVATE[activation](h).view(shape).expand(y[:, missing].shape)
    if saved is not None:
        with torch.enable_grad():
            leaf = h.detach().float().requires_grad_()
            (derivative,) = torch.autograd.grad(_ACTIVATE[activation](leaf).sum(), leaf)
        saved[:, missing] = derivative.to(saved.dtype).view(shape).expand(saved[:, missing].shape)


def bias_gradient(db: Tensor, source: Source, missing: Tensor | None, everything: bool) -> None:
    """The sums of a gradient at channels that no position is, or at every channel."""
    if missing is None and not everything:
        return
    grad = source.values if everything else source.values[:, missing]
    grad = grad.float()
    if source.saved is not None:
        saved = (source.saved if everything else source.saved[:, missing]).float()
        derivative = {"relu": lambda: (saved > 0).float(), "tanh": lambda: 1 - saved * saved, "kept": lambda: saved}
        grad = grad * derivative[source.derivative]()
    total = grad.sum([0, *range(2, grad.dim())]).to(db.dtype)
    if everything:
        db.copy_(total)
    else:
        db[missing] = total
