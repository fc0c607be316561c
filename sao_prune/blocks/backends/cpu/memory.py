"""Memory for the kernels' large results, kept from one to the next.

An allocator that gives 20 MB back to the system has them handed out again page by page, each cleared first: as much
work as a kernel's own. Whether it does so depends on what else the process has freed.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEAST = 1 << 20  # bytes: below, allocators keep what they have. Above, a result cannot be resized in place.


class _Loan(weakref.ref):  # type: ignore[type-arg]
    """A buffer out on loan, for as long as the array over it lives."""

    buffer: mmap.mmap


class Pool:
    """Buffers for single precision numbers: in all at most twice as large as what was in use at once."""

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []  # the one used last at the end
        self._loans: dict[int, _Loan] = {}
        self._peak = 0

    @property
    def idle(self) -> int:
        """Bytes kept and not in use."""
        return sum(map(len, list(self._idle)))

    @property
    def in_use(self) -> int:
        """Bytes on loan."""
        return sum(len(loan.buffer) for loan in list(self._loans.values()))

    def array(self, count: int) -> NDArray[np.float32]:
        """An array whose memory comes back when nothing refers to it any more."""
        buffer = self._take(count * 4)
        array = np.frombuffer(buffer, np.float32, count)
        loan = _Loan(array, self._returned)
        loan.buffer = buffer
        self._loans[id(loan)] = loan
        return array

    def release(self) -> None:
        """Give back to the system what is not in use."""
        self._idle.clear()
        self._peak = 0

    # Of several threads, and of callbacks at any moment: no step relies on what a step before it has found.

    def _returned(self, loan: _Loan) -> None:
        del self._loans[id(loan)]
        self._idle.append(loan.buffer)

    def _take(self, size: int) -> mmap.mmap:
        while True:
            fitting = [b for b in list(self._idle) if size <= len(b) <= 2 * size]
            if not fitting:
                return self._new(size)
            buffer = min(reversed(fitting), key=len)
            try:
                self._idle.remove(buffer)
            except ValueError:
                continue
            return buffer

    def _new(self, size: int) -> mmap.mmap:
        used = self.in_use + size
        self._peak = max(self._peak, used)
        while self._idle and self.idle + used > 2 * self._peak:
            del self._idle[:1]
        try:
            return _map(size)
        except OSError:
            self._idle.clear()
        try:
            return _map(size)
        except OSError as error:
            raise MemoryError(f"no memory for a result of {size:,} bytes") from error


def _map(size: int) -> mmap.mmap:
    # A process that is forked must not write into its parent's results.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


_pool = Pool()


def release_memory() -> None:
    """Give the system back what the native kernels, and the C library, keep of memory that nothing uses.

    The kernels keep at most twice what they had in use at once, for their next results, also when a model is deleted.
    glibc keeps what numbers of passing use have left: drawing a model's weights leaves more than they take.

    Example:
        >>> from sao_prune.blocks import release_memory
        >>> release_memory()
    """
    _pool.release()
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no library of the process
        return None
    return found


def empty(shape: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """`torch.empty` in single precision on the CPU.

    Args:
        shape: of the tensor.
        order: its dimensions from the outermost in memory to the innermost; ``None``: as they come.
    """
    if order is None and math.prod(shape) * 4 < _LEAST:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    strides, stride = [1] * len(shape), 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = stride
        stride *= shape[dim]
    if stride * 4 < _LEAST:
        return torch.empty_strided(shape, strides, dtype=torch.float32, device="cpu")
    return _strided(stride, shape, strides)


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like` of such a tensor."""
    if x.numel() * 4 < _LEAST or not _dense(x):
        return torch.empty_like(x, requires_grad=False)
    return _strided(x.numel(), x.shape, x.stride())


def _strided(count: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    flat = torch.from_numpy(_pool.array(count))
    result: Tensor = flat.set_(flat, 0, tuple(shape), tuple(strides))  # type: ignore[call-overload]
    return result


def _dense(x: Tensor) -> bool:
    """Whether the tensor's numbers lie without gaps or overlaps."""
    wanted = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride != wanted:
            return False
        wanted *= size
    return True
