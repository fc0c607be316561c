"""Backends of your own: what computes the products of block layers, asked before those of this library."""

from __future__ import annotations

from torch import Tensor

from ..functional import Geometry
from ..layout import Layout
from . import torch as plain

_REGISTRY: dict[str, Backend] = {}


class Backend:
    """Base of the backends that users register; what a subclass leaves out is computed by torch's own operations.

    The operators ``torch.ops.sao_prune.block_linear`` and ``block_conv`` ask every registered backend, in the order of
    registration, whether it `suits_linear` or `suits_conv`; the first that does computes forward and backward. Layers
    that compute a norm or a second layer along with themselves are operators of their own and do not ask.

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
        ...     def suits_linear(self, x, weight, *others):
        ...         self.calls += 1
        ...         return False
        >>> backend = register(Counting())
        >>> _ = BlockLinear(interleaved(8, 8, 2))(torch.ones(1, 8))
        >>> backend.calls, unregister("counting") is backend
        (1, True)
    """

    name: str = ""

    def suits_linear(self, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
        """Whether it takes a linear layer's operands, by their shapes, types and devices.

        Args:
            x: input, ``(..., n)``.
            weight: packed, ``(groups, rows, cols)``.
            *others: bias, gradient of the result and what was kept, as far as there are any.
        """
        return False

    def suits_conv(self, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> bool:
        """Whether it takes a convolution's operands.

        Args:
            x: input, ``(batch, n, *space)``.
            weight: packed, ``(groups, rows, cols, *kernel)``.
            geometry: stride, padding and dilation.
            *others: as for `suits_linear`.
        """
        return False

    def linear_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``f(x W^T + b)``, and the derivative of ``f`` there if it is to be kept.

        Args:
            x: input, ``(..., n)``.
            weight: packed, ``(groups, rows, cols)``.
            bias: ``(m,)``, or ``None``.
            layout: where the blocks' channels are.
            activation: a key of `sao_prune.blocks.functional.ACTIVATIONS`, ``""`` for none.
            keep: whether the backward pass will need the derivative.
        """
        return plain.linear_forward(x, weight, bias, layout, activation, keep)

    def activated(self, y: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor | None]:
        """What `linear_forward` returns of ``x W^T + b``.

        Args:
            y: the product with its bias.
            activation: as for `linear_forward`.
            keep: likewise.
        """
        return plain.activated(y, activation, keep)

    def linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        layout: Layout,
        needs: tuple[bool, ...],
        activation: str,
        values: Tensor | None,
    ) -> plain.Gradients:
        """Gradients of input, packed weight and bias, ``None`` where ``needs`` does not ask for one.

        Args:
            grad: of the result.
            x: as it was given to the forward.
            weight: likewise.
            layout: likewise.
            needs: whether each of the three is asked for.
            activation: likewise.
            values: the derivative that was kept, or the result where that tells it (relu, tanh).
        """
        return plain.linear_backward(grad, x, weight, layout, needs, activation, values)

    def conv_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Layout,
        geometry: Geometry,
        activation: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As `linear_forward`, of a convolution."""
        return plain.conv_forward(x, weight, bias, layout, geometry, activation, keep)

    def conv_backward(
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
        """As `linear_backward`, of a convolution."""
        return plain.conv_backward(grad, x, weight, layout, geometry, needs, activation, values)


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
        >>> registered(), register(Mine()).name, registered(), unregister("mine").name
        ((), 'mine', ('mine',), 'mine')
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
    """The names of the registered backends, in the order in which they are asked.

    Returns:
        The names.

    Example:
        >>> registered()
        ()
    """
    return tuple(_REGISTRY)


def linear_backend(x: Tensor, weight: Tensor, *others: Tensor | None) -> Backend | None:
    """The first registered backend that suits a linear layer's operands."""
    return next((b for b in _REGISTRY.values() if b.suits_linear(x, weight, *others)), None)


def conv_backend(x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> Backend | None:
    """The first registered backend that suits a convolution's operands."""
    return next((b for b in _REGISTRY.values() if b.suits_conv(x, weight, geometry, *others)), None)
