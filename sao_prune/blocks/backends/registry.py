"""Backends of your own: what computes the products of block layers, asked before those of this library."""

from __future__ import annotations

from torch import Tensor

from ..functional import Geometry
from ..layout import Layout
from . import torch as plain

_REGISTRY: dict[str, Backend] = {}


class Backend:
    """Base of the backends that users register; what a subclass leaves out is computed by torch's own operations.

    Every operator of a block layer asks each registered backend, in the order of registration, whether it `suits` a
    product's operands; the first that does computes it, forward and backward. Layers that compute a norm, or the linear
    layer behind them, along with themselves ask it too: their products are then computed one by one, and the norm by
    torch.

    ``weight`` is packed, ``(groups, rows, cols, *kernel)``, one matrix a block. ``layout.inputs.channels(x)`` puts the
    channels (dimension 1) of ``x`` in the order of the blocks, ``layout.outputs.channels(y)`` puts those of a product
    into the layer's own. Results lie in memory as the input does. Nothing here is differentiated: torch's autograd and
    compilers stand in front of the operators.

    Example:
        >>> import torch
        >>> from sao_prune.blocks import BlockLinear
        >>> from sao_prune.topology import interleaved
        >>> class Counting(Backend):
        ...     name, calls = "counting", 0
        ...     def suits(self, x, weight, geometry, *others):
        ...         self.calls += 1
        ...         return False
        >>> backend = register(Counting())
        >>> _ = BlockLinear(interleaved(8, 8, 2))(torch.ones(1, 8))
        >>> backend.calls, unregister("counting") is backend
        (1, True)
    """

    name: str = ""

    def suits(self, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> bool:
        """Whether it takes these operands, by their shapes, types and devices.

        Args:
            x: input, ``(batch, n, *space)``; of a linear layer ``(..., n)``.
            weight: packed, ``(groups, rows, cols, *kernel)``; of a linear layer without a kernel.
            geometry: stride, padding and dilation; of a linear layer empty.
            *others: bias, gradient of the result and what was kept, as far as there are any.
        """
        return False

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Layout,
        geometry: Geometry,
        activation: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``f(x W^T + b)``, or of a convolution, and the derivative of ``f`` there if it is to be kept.

        Args:
            x: as for `suits`.
            weight: likewise.
            bias: ``(m,)``, or ``None``.
            layout: where the blocks' channels are.
            geometry: as for `suits`.
            activation: a key of `sao_prune.blocks.functional.ACTIVATIONS`, ``""`` for none.
            keep: whether the backward pass will need the derivative.
        """
        return plain.forward(x, weight, bias, layout, geometry, activation, keep)

    def activated(self, y: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor | None]:
        """What `forward` returns of ``y = x W^T + b``; the other arguments are those of `forward`."""
        return plain.activated(y, activation, keep)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        layout: Layout,
        geometry: Geometry,
        needs: tuple[bool, ...],
        activation: str,
        values: Tensor | None,
    ) -> plain.Gradients:
        """Gradients of input, packed weight and bias, ``None`` where ``needs`` does not ask for one.

        Args:
            grad: of the result.
            x: as it was given to `forward`, like weight, layout, geometry and activation.
            weight: likewise.
            layout: likewise.
            geometry: likewise.
            needs: whether each of the three is asked for.
            activation: likewise.
            values: the derivative that was kept, or the result where that tells it (relu, tanh).
        """
        return plain.backward(grad, x, weight, layout, geometry, needs, activation, values)


def register(backend: Backend) -> Backend:
    """Let a backend compute the layers that suit it, in this process.

    Args:
        backend: an instance; its ``name`` tells it from others.

    Returns:
        The backend.

    Raises:
        TypeError: if it is no `Backend`.
        ValueError: if its name is empty or taken.

    Example:
        >>> class Mine(Backend):
        ...     name = "mine"
        >>> register(Mine()).name, unregister("mine").name
        ('mine', 'mine')
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"a backend is an instance of a subclass of sao_prune.blocks.Backend, got {backend!r}")
    if not backend.name or backend.name in (*_REGISTRY, "cpu", "triton"):
        taken = ", ".join(("cpu", "triton", *_REGISTRY))
        raise ValueError(f"a backend needs a name of its own, got {backend.name!r}; taken: {taken}")
    _REGISTRY[backend.name] = backend
    return backend


def unregister(name: str) -> Backend:
    """Take a registered backend away again.

    Args:
        name: of the backend.

    Returns:
        The backend.

    Raises:
        ValueError: if none has that name.

    Example:
        >>> unregister("mine")
        Traceback (most recent call last):
        ValueError: no backend is registered as 'mine'; registered: none
    """
    if name not in _REGISTRY:
        raise ValueError(f"no backend is registered as {name!r}; registered: {', '.join(_REGISTRY) or 'none'}")
    return _REGISTRY.pop(name)


def registered() -> tuple[str, ...]:
    """Names of the registered backends, in the order in which they are asked."""
    return tuple(_REGISTRY)


def suited(x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> Backend | None:
    """The first registered backend that suits these operands."""
    for backend in _REGISTRY.values():
        if backend.suits(x, weight, geometry, *others):
            return backend
    return None
