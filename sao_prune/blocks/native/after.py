"""What may follow a layer within its kernel: batch norm, an activation, or one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from ..order import is_features_first
from .launch import ACTS, Call, Forward, Gradients, Slope, call, ready
from .memory import empty_like

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# Activations whose slope is known from their result, and under which name: of others the slope is kept.
_OF_RESULT = {"relu": "relu", "tanh": "tanh of result"}
Differentiable = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Norm:
    """A call of `torch.nn.functional.batch_norm`."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    # Of a norm in training, once it has been called: the layer's result, its mean and its variance.
    measured: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def suits(self, channels: int, values: int) -> bool:
        """Whether the kernels can take this norm of a result with so many channels and values for each."""
        tensors = [t for t in (self.running_mean, self.running_var, self.weight, self.bias) if t is not None]
        kept = self.running_mean is not None, self.running_var is not None
        known = kept == (True, True) or (self.training and kept == (False, False))
        numbers = isinstance(self.momentum, float) and self.eps > 0
        enough = values > 1 or not self.training
        return known and numbers and enough and ready(*tensors) and all(t.shape == (channels,) for t in tensors)

    @property
    def known(self) -> tuple[Tensor, Tensor]:
        """The running averages, of a norm that goes by them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def plain(self, y: Tensor) -> Tensor:
        """The norm of ``y``, by torch."""
        return F.batch_norm(
            y, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and shift of every channel, and the inverse of its deviation."""
        inverse = (variance + self.eps).rsqrt()
        scale = inverse if self.weight is None else inverse * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return scale, shift, inverse

    def measure(self, kernel: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's result and its moments; of a norm in training once, together with the running averages."""
        if self.measured:
            return self.measured[0]
        z, _, moments = kernel.forward(x, weight, bias, Forward(moments=self.training))
        if moments is None:
            mean, variance = self.known
            return z, mean.clone(), variance.clone()
        self._note(*moments, z.numel() // z.shape[1])
        self.measured.append((z, *moments))
        return self.measured[0]

    def _note(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Update the running averages in place, as torch does."""
        if self.running_mean is not None:
            self.running_mean.lerp_(mean, self.momentum)
        if self.running_var is not None:
            self.running_var.lerp_(variance * (values / (values - 1)), self.momentum)


@dataclass(frozen=True, eq=False, slots=True)
class After:
    """What a layer's result goes through.

    Attributes:
        norm: first a batch norm, or none.
        act: then one of ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, or none.
        begun: whether to do no more than measure what a norm in training goes by; the result does not matter.
    """

    norm: Norm | None = None
    act: str = ""
    begun: bool = False

    def plain(self, y: Tensor) -> Tensor:
        """The same by torch."""
        y = y if self.norm is None else self.norm.plain(y)
        return _ACTIVATIONS[self.act](y) if self.act else y


def run(kernel: Call, plain: Differentiable, x: Tensor, weight: Tensor, bias: Tensor | None, after: After) -> Tensor:
    """A layer and what follows it, differentiable where gradients are enabled.

    Args:
        kernel: the layer.
        plain: the layer from operations that can be differentiated twice, of input, weight and the result's bias.
        x: its input.
        weight: the packed matrices.
        bias: shape ``(m,)``, or ``None``.
        after: what follows.
    """
    norm, packing = after.norm, kernel.packing
    gradients = torch.is_grad_enabled()
    if norm is not None and not (norm.training or gradients):
        scale, shift, _ = norm.affine(*norm.known)
        bias = shift if bias is None else bias * scale + shift
        factors = packing.bias(scale)
        assert factors is not None
        weight, norm = weight * factors.view(*weight.shape[:2], *[1] * (weight.dim() - 2)), None
    weight = weight.contiguous()
    bias = packing.bias(bias) if packing.raw else bias
    bias = None if bias is None else bias.contiguous()
    if norm is not None and after.begun:
        with torch.no_grad():
            return norm.measure(kernel, x, weight, bias)[0]
    if norm is not None:
        y: Tensor = _Normed.apply(x, weight, bias, norm.weight, norm.bias, kernel, plain, norm, after.act)
    elif gradients:
        y = _Activated.apply(x, weight, bias, kernel, plain, after.act)
    else:
        y = kernel.forward(x, weight, bias, Forward(after.act))[0]
    return y


class _Activated(torch.autograd.Function):
    """A layer and its activation, if it has one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Call, plain: Differentiable, act: str
    ) -> Tensor:
        keep = bool(act) and act not in _OF_RESULT
        y, slopes, _ = kernel.forward(x, weight, bias, Forward(act, keep))
        ctx.save_for_backward(x, weight, bias, slopes if keep else y if act else None)  # type: ignore[arg-type]
        ctx.kernel, ctx.plain, ctx.act = kernel, plain, act  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, bias, values = ctx.saved_tensors
        needs: tuple[bool, ...] = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not ready(grad, weight):
            found = again(lambda *t: After(act=ctx.act).plain(ctx.plain(*t)), (x, weight, bias), needs, grad)
        else:
            slope = Slope(_OF_RESULT.get(ctx.act, "known slope"), values) if ctx.act else None
            found = ctx.kernel.backward(grad, x, weight, needs, slope)
        return *found, None, None, None


class _Normed(torch.autograd.Function):
    """A layer, its batch norm, and the activation of that, if there is one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        offset: Tensor | None,
        kernel: Call,
        plain: Differentiable,
        norm: Norm,
        act: str,
    ) -> Tensor:
        z, mean, variance = norm.measure(kernel, x, weight, bias)
        scale, shift, inverse = norm.affine(mean, variance)
        y = empty_like(z)
        call("norm_forward", z, y, scale, shift, ACTS[act], *_layout(z), torch.get_num_threads())
        ctx.save_for_backward(x, weight, bias, gain, offset, z, mean, variance)  # type: ignore[arg-type]
        ctx.numbers = scale, shift, inverse  # type: ignore[attr-defined]
        ctx.kernel, ctx.plain, ctx.norm, ctx.act = kernel, plain, replace(norm, measured=[]), act  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, bias, gain, offset, z, mean, variance = ctx.saved_tensors
        training, needs = ctx.norm.training, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() or not ready(grad, weight):

            def whole(
                x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, offset: Tensor | None
            ) -> Tensor:
                norm = replace(ctx.norm, weight=gain, bias=offset)
                if training:
                    norm = replace(norm, running_mean=None, running_var=None)
                else:
                    norm = replace(norm, running_mean=mean, running_var=variance)
                return After(norm, ctx.act).plain(ctx.plain(x, weight, bias))

            return *again(whole, (x, weight, bias, gain, offset), needs, grad), None, None, None, None
        scale, shift, inverse = ctx.numbers
        grad = _as(grad, z)
        totals = z.new_empty(2, z.shape[1], dtype=torch.float64)
        threads = torch.get_num_threads()
        call("norm_sums", grad, z, scale, shift, mean, ACTS[ctx.act], totals, *_layout(z), threads)
        through, moment = totals.to(z.dtype)
        inner = constant = torch.zeros_like(scale)
        if training:
            values = z.numel() // z.shape[1]
            inner = -scale * inverse * inverse * moment / values
            constant = -scale * through / values
        slope = Slope(ctx.act, z, torch.stack([scale, shift, scale, inner, constant, mean]))
        found: Gradients = ctx.kernel.backward(grad, x, weight, needs[:3], slope)
        affine = moment * inverse if needs[3] else None, through if needs[4] else None
        return *found, *affine, None, None, None, None


def _layout(z: Tensor) -> tuple[int, int, int, int]:
    """Batch, channels and positions of a result, and whether channels are innermost."""
    if z.dim() == 2:
        return (1, z.shape[1], z.shape[0], 0) if is_features_first(z) else (z.shape[0], z.shape[1], 1, 1)
    return z.shape[0], z.shape[1], z[0, 0].numel(), int(z.stride(1) == 1 and not z.is_contiguous())


def _as(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient that lies in memory as its tensor does."""
    if grad.stride() == like.stride():
        return grad
    return empty_like(like).copy_(grad)


def again(
    function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients from operations that can be differentiated again."""
    with torch.enable_grad():
        inputs = [t if t is None or t.requires_grad else t.detach() for t in tensors]
        y = function(*inputs)
    wanted = [t for t, need in zip(inputs, needs) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if need else None for need in needs)
