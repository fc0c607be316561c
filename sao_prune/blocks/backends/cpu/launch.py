"""Calls of the compiled kernels on tensors: layouts, sizes of panels, memory for results."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import MATRIX, Geometry
from ...layout import Layout
from ...permutation import dense, is_column_major
from .build import library
from .memory import empty, empty_like

# Floats of a panel of rows and its results that a core keeps at hand, and the least and most rows of one: measured.
_FORWARD = 1 << 17, 32, 96
_BACKWARD = 5 << 15, 80, 256
_IMAGE = 1 << 18
_LANES = 16
# Size, kernel, dilation, stride and padding of a dimension that is not there.
_NONE = (1, 1, 1, 1, 0)
#: Of planes without a kernel.
LINE = Geometry((1,), (0,), (1,))
# Dimensions from the outermost to the innermost.
_COLUMNS = (1, 0)
_PIXELS = (0, 2, 3, 1)

# As the kernels number them.
ACTS = {"": 0, "relu": 1, "gelu": 2, "silu": 3, "tanh": 4, "tanh of result": 5, "known derivative": 6}

_Argument = Tensor | int | float | None
_NUMBERS = frozenset((int, bool, float, type(None)))


@dataclass(frozen=True)
class Forward:
    """What a forward pass is to do besides the product.

    Attributes:
        act: what to make of the product.
        keep: whether to give the activation's derivatives back as well.
        moments: whether to measure mean and variance of the product's channels; then ``act`` is none.
    """

    act: str = ""
    keep: bool = False
    moments: bool = False


class Norm(NamedTuple):
    """A batch norm by averages behind a product, of every channel, before the activation."""

    gain: Tensor | None
    offset: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float


class Derivative(NamedTuple):
    """How a gradient of the result becomes one of the product.

    Attributes:
        act: what was made of the product.
        values: what its derivative is a function of; laid out as the result.
        numbers: shape ``(6, m)``: scale and shift of what was activated, factors of the gradient through it and of
            the product less its mean, a constant, and the mean; ``None`` where there was nothing but the activation.
    """

    act: str
    values: Tensor
    numbers: Tensor | None = None


# The product alone, and what the kernels are told then.
PLAIN = Forward()
PLANS = {(act, keep): Forward(act, keep) for act in ACTS for keep in (False, True)} | {("", False): PLAIN}
_NO_NORM = (None, None, None, None, 0.0)
_NOTHING = (0, None, None, None, *_NO_NORM)

Results = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def ready(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: single precision on the CPU, in memory that is there.

    A storage may have been freed and be filled again later, as sharded parameters are.
    """
    for t in tensors:
        if t is None:
            continue
        if t.dtype is not torch.float32 or not t.is_cpu:
            return False
        # As `is_there`; without elements there is no pointer either.
        start = t.data_ptr()
        if start == 0 or start == t.storage_offset() * 4:
            return False
    return library() is not None


def is_there(t: Tensor) -> bool:
    """Whether a tensor has memory. Its storage is not asked for: autograd adds to no gradient in place whose storage
    Python has seen."""
    return t.numel() == 0 or t.data_ptr() != t.storage_offset() * t.element_size()


class Call(ABC):
    """The arguments of one call of the kernels that are not tensors to differentiate by."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Forward = PLAIN, norm: Norm | None = None
    ) -> Results:
        """The result, derivatives and moments if the plan asks for them."""

    @abstractmethod
    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...], derivative: Derivative | None = None
    ) -> Gradients:
        """Gradients of input, weight and bias, as far as they are needed."""

    def _extras(self, y: Tensor, plan: Forward, norm: Norm | None) -> tuple[tuple[_Argument, ...], Results]:
        """The last arguments of a forward pass, and its results."""
        if plan is PLAIN and norm is None:
            return _NOTHING, (y, None, None)
        derivatives = empty_like(y) if plan.keep else None
        moments = (_numbers(y, self.layout), _numbers(y, self.layout)) if plan.moments else None
        last = derivatives, *(moments or (None, None)), *(norm or _NO_NORM)
        return (ACTS[plan.act], *last), (y, derivatives, moments)

    def _weights(self, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Room for the gradients of weight and bias."""
        dw = torch.empty_like(weight) if needs[1] else None
        return dw, _numbers(weight, self.layout) if needs[2] else None


def call(name: str, *arguments: _Argument) -> None:
    """Call a kernel.

    Raises:
        MemoryError: if there is none for its buffers.
    """
    call_with(name, *[a if type(a) in _NUMBERS else a.data_ptr() for a in arguments])  # type: ignore[union-attr]


def call_with(name: str, *arguments: Any) -> None:
    """The same with addresses in place of tensors, which the caller holds.

    Raises:
        MemoryError: if there is none for its buffers.
    """
    if getattr(library(), name)(*arguments):
        raise MemoryError(f"{name}: no memory for its buffers")


@lru_cache(maxsize=1024)
def panel_lines(lines: int, images: int, widths: int, limits: tuple[int, int, int], threads: int) -> int:
    """Lines of a panel: as many as a core's cache holds, and as many panels for every thread.

    Args:
        lines: of an image, one pixel each; rows of a batch.
        images: how many.
        widths: floats of a line.
        limits: floats of a panel, and its least and most lines.
        threads: that share the work.
    """
    floats, least, most = limits
    wanted = min(max(floats // widths, least), most)
    share = threads // math.gcd(threads, images)
    panels = -(-lines // (wanted * share)) * share
    return -(-lines // (panels * _LANES)) * _LANES


def _axes(space: Sequence[int], kernel: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """Size, kernel, dilation, stride and padding of two dimensions."""
    found = zip(space, kernel, geometry.dilation, geometry.stride, geometry.padding)
    return (*_NONE * (2 - len(kernel)), *chain.from_iterable(found))


def _numbers(like: Tensor, layout: Layout) -> Tensor:
    """Room for one number a channel."""
    return like.new_empty(layout.channels)


class Rows(Call):
    """Channels innermost: rows of a batch ``(N, n)``, in either order, or images in channels-last format.

    Args:
        layout: of the blocks.
        column_major: whether the result of a batch is to lie column after column.
        kernel: of images.
        geometry: of images.
    """

    def __init__(
        self, layout: Layout, column_major: bool, kernel: tuple[int, ...] = (), geometry: Geometry = MATRIX
    ) -> None:
        super().__init__(layout)
        self.column_major, self.kernel, self.geometry = column_major, kernel, geometry

    def _arguments(self, x: Tensor, weight: Tensor, limits: tuple[int, int, int]) -> tuple[tuple[_Argument, ...], int]:
        """Sizes and tables, and the lines of a panel."""
        layout = self.layout
        m, tables = layout.channels, layout.addresses
        if not self.kernel:
            batch, n = x.shape
            lines = panel_lines(batch, 1, n + m, limits, torch.get_num_threads())
            return (1, n, m, batch, *_NONE[1:], *_NONE, layout.groups, layout.rows, layout.cols, *tables), lines
        batch, n, *space = x.shape
        groups, rows, cols = weight.shape[:3]
        where = self.geometry
        # As many lines as a core's cache holds, at least as many as the kernel is high.
        reach = where.dilation[-1] * (self.kernel[-1] - 1)
        pitch = (space[-1] + reach) // where.stride[-1] + 1
        phases = math.prod(min(k, s) for k, s in zip(self.kernel, where.stride))
        lines = max(_IMAGE // ((n * phases + m) * pitch), self.kernel[0])
        return (batch, n, m, *_axes(space, self.kernel, where), groups, rows, cols, *tables), lines

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Forward = PLAIN, norm: Norm | None = None
    ) -> Results:
        space, channels = self.geometry.output(x.shape[2:], self.kernel), self.layout.channels
        # One pixel, or one channel, lies as torch has it: both ways, and not marked as channels last.
        pixels = self.kernel and channels > 1 and math.prod(space) > 1
        y = empty((x.shape[0], channels, *space), _PIXELS if pixels else _COLUMNS if self.column_major else None)
        arguments, lines = self._arguments(x, weight, _FORWARD)
        extras, results = self._extras(y, plan, norm)
        columns = not self.kernel and is_column_major(x), self.column_major
        call("rows_forward", x, weight, bias, y, *arguments, *columns, lines, torch.get_num_threads(), *extras)
        return results

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...], derivative: Derivative | None = None
    ) -> Gradients:
        matrix = not self.kernel
        columns = matrix and is_column_major(x)
        if matrix and not is_column_major(grad):
            grad = dense(grad)
        dx = None
        if needs[0]:
            dx = empty_like(x) if self.kernel else empty(x.shape, _COLUMNS if columns else None)
        dw, db = self._weights(weight, needs)
        arguments, lines = self._arguments(x, weight, _BACKWARD)
        layouts = matrix and is_column_major(grad), columns, columns
        values = derivative is not None and matrix and is_column_major(derivative.values)
        tensors, last = (grad, x, weight, dx, dw, db), _through(derivative, values)
        call("rows_backward", *tensors, *arguments, *layouts, lines, torch.get_num_threads(), *last)
        return dx, dw, db


class Planes(Call):
    """Channels as planes ``(batch, n, *space)``: convolutions, tokens to mix."""

    def __init__(self, layout: Layout, kernel: tuple[int, ...], geometry: Geometry) -> None:
        super().__init__(layout)
        self.kernel, self.geometry = kernel, geometry

    def _arguments(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        sizes = len(x), x.shape[1], self.layout.channels, *_axes(x.shape[2:], self.kernel, self.geometry)
        return *sizes, *weight.shape[:3], *self.layout.addresses, torch.get_num_threads()

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Forward = PLAIN, norm: Norm | None = None
    ) -> Results:
        y = empty((len(x), self.layout.channels, *x.shape[2:]))
        extras, results = self._extras(y, plan, norm)
        call("planes_forward", x, weight, bias, y, *self._arguments(x, weight), *extras)
        return results

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...], derivative: Derivative | None = None
    ) -> Gradients:
        dx = empty_like(x) if needs[0] else None
        dw, db = self._weights(weight, needs)
        tensors, last = (dense(grad), x, weight, dx, dw, db), _through(derivative)
        call("planes_backward", *tensors, *self._arguments(x, weight), *last)
        return dx, dw, db


def _through(derivative: Derivative | None, *layout: bool) -> tuple[_Argument, ...]:
    """The last arguments of a backward pass."""
    if derivative is None:
        return None, *layout, 0, None
    return derivative.values, *layout, ACTS[derivative.act], derivative.numbers
