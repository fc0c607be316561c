"""Linear maps given by their products: modules without their bias, and Jacobians of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..discovery.trace import evaluating

Product = Callable[[Tensor], Tensor]

_CHUNK = 64


@dataclass(frozen=True)
class LinearMap:
    """A linear map by its products: ``forward`` takes flat vectors ``(inputs,)``, ``adjoint`` flat ``(outputs,)``."""

    inputs: int
    outputs: int
    forward: Product
    adjoint: Product
    dtype: torch.dtype
    device: torch.device
    dense: Callable[[], Tensor] | None = None

    @property
    def side(self) -> int:
        """Number of singular values, ``min(inputs, outputs)``."""
        return min(self.inputs, self.outputs)

    def matrix(self) -> Tensor:
        """The map as a dense ``(outputs, inputs)`` matrix, from products with unit vectors along its shorter side."""
        if self.dense is not None:
            return self.dense()
        tall = self.outputs > self.inputs
        product, count = (self.forward, self.inputs) if tall else (self.adjoint, self.outputs)
        units = torch.eye(count, dtype=self.dtype, device=self.device)
        out = torch.stack([product(unit) for unit in units])
        return out.T if tall else out


def jacobian_map(model: Callable[[Tensor], Tensor], x: Tensor) -> LinearMap:
    """The Jacobian of ``model`` at ``x`` as products; the graph is built once and each product is one backward pass.

    The product with a vector of inputs is the gradient of the (linear) map ``v -> J^T v``, so only reverse-mode
    formulas are needed, which every layer has.

    Raises:
        ValueError: if ``x`` is not floating point, or the model's output does not depend on it.
    """
    if not x.is_floating_point():
        raise ValueError(f"the Jacobian is taken with respect to a floating-point input, got {x.dtype}")
    point = x.detach().clone().requires_grad_(True)
    with torch.enable_grad(), _differentiable():
        y = model(point)
        if not isinstance(y, Tensor) or not y.requires_grad:
            raise ValueError("the model's output must be one tensor that depends on its input")
        probe = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, point, probe, create_graph=True, allow_unused=True)
    if pulled is None:
        raise ValueError("the model's output does not depend on its input")

    def forward(v: Tensor) -> Tensor:
        if not pulled.requires_grad:
            return torch.zeros_like(y).flatten()
        (pushed,) = torch.autograd.grad(pulled, probe, v.view_as(pulled), retain_graph=True, allow_unused=True)
        return (torch.zeros_like(y) if pushed is None else pushed).detach().flatten()

    def adjoint(v: Tensor) -> Tensor:
        (back,) = torch.autograd.grad(y, point, v.view_as(y), retain_graph=True)
        return back.detach().flatten()

    def rows() -> Tensor:
        units = torch.eye(y.numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape)
        parts = [_batched_adjoint(y, point, chunk) for chunk in units.split(_CHUNK)]
        return torch.cat([part.flatten(1) for part in parts])

    dense = rows if y.numel() <= x.numel() else None
    return LinearMap(x.numel(), y.numel(), forward, adjoint, y.dtype, y.device, dense)


def module_map(module: nn.Module, input_shape: tuple[int, ...]) -> LinearMap:
    """A linear module (its bias does not matter) on one sample of ``input_shape``, batch dimension left out."""
    own = [*module.parameters(), *module.buffers()]
    like = own[0] if own else torch.zeros(())
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    zero = torch.zeros(1, *input_shape, dtype=dtype, device=like.device)
    op = jacobian_map(module, zero)

    @torch.no_grad()
    def columns() -> Tensor:
        units = torch.eye(zero.numel(), dtype=dtype, device=zero.device).view(-1, *input_shape)
        rest = module(zero)
        return torch.cat([(module(chunk) - rest).flatten(1) for chunk in units.split(_CHUNK)]).T

    return replace(op, dense=columns)


def _batched_adjoint(y: Tensor, point: Tensor, cotangents: Tensor) -> Tensor:
    """``J^T v`` for a batch of ``v``: one vectorised backward pass, or one each where a layer cannot be vectorised."""
    try:
        (out,) = torch.autograd.grad(y, point, cotangents, retain_graph=True, is_grads_batched=True)
    except RuntimeError:
        out = torch.stack([torch.autograd.grad(y, point, v, retain_graph=True)[0] for v in cotangents])
    return out.detach()


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Evaluation mode and no parameter gradients while inside; restored afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Attention kernels that can be differentiated twice; the fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
