"""One weight of a model, as a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..naming import dotted

ALREADY_PRUNED = "already pruned"
RAW = "Parameter"


@dataclass(frozen=True)
class PrunableWeight:
    """One weight tensor of a model, seen as ``parts`` matrices ``(m, n, *kernel)``.

    The matrices lie one after the other along dimension 0, as groups of a convolution, gates of an RNN and projections
    of attention do; or, where the weight is ``stacked``, along dimensions of their own in front of the last two, as
    experts ``(experts, out, in)`` do. A stack has no kernel.

    Attributes:
        module: path of the module that owns it, ``""`` for the model itself.
        tensor: name of the parameter there, ``"weight"``, ``"in_proj_weight"``, ``"weight_hh_l0"``, ..
        kind: class name of the module, or ``"Parameter"`` for a raw parameter.
        shape: shape of the tensor.
        parts: independent matrices in it.
        transposed: whether inputs come before outputs, as in transposed convolutions.
        aliases: other ``(module, tensor)`` names of the same parameter (tied weights).
        reason: why it is skipped; ``None`` if it can be pruned.
        last: whether it is the model's last layer.
        stacked: whether the matrices have dimensions of their own.
        standardised: whether the layer standardises it in its forward.

    Example:
        >>> experts = PrunableWeight("moe", "up_proj", "Experts", (4, 96, 64), parts=4, stacked=True)
        >>> experts.matrix, experts.kernel
        ((96, 64), ())
        >>> PrunableWeight("conv", "weight", "Conv1d", (4, 96, 64)).kernel
        (64,)
    """

    module: str
    tensor: str
    kind: str
    shape: tuple[int, ...]
    parts: int = 1
    transposed: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    reason: str | None = None
    last: bool = False
    stacked: bool = False
    standardised: bool = False

    @property
    def name(self) -> str:
        """The parameter's full name in the model."""
        return dotted(self.module, self.tensor)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(m, n)``, outputs and inputs of each part."""
        rows, cols = self.shape[-2:] if self.stacked else (self.shape[0] // self.parts, self.shape[1])
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size, empty for a matrix."""
        return () if self.stacked else self.shape[2:]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def matrices(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor`` as ``(parts, m, n, *kernel)``.

        Raises:
            RuntimeError: for a stack of four or more dimensions that lies in memory so that there is no such view.
        """
        if self.stacked:
            parts = tensor.view(self.parts, *tensor.shape[-2:])
        else:
            parts = tensor.unflatten(0, (self.parts, -1))
        return parts.transpose(1, 2) if self.transposed else parts
