"""Topologies in the buffers of layers: set numbers as integers that may be averaged, and what the buffers hold now."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._torch import batch_dim, is_batched, is_wrapped, transforms_active, version, without_modes, without_transforms
from .._torch import unwrapped as inner
from .block import BlockTopology

# A set number v is stored as 4 v + 6, no set as 2: an average of equal buffers, as EMA takes it, is off by one at worst
# after truncation to integers, and a code is never 0, by which plain numbers are told apart.
_STEP, _OFFSET, _NONE = 4, 6, 2


def encode_sets(sets: Tensor) -> Tensor:
    """Set numbers, -1 for none, as the integers that a layer's buffers hold: averaging them does no harm.

    Args:
        sets: set numbers, shape ``(nodes,)``, -1 for none.

    Returns:
        Codes of the same shape, uint8 where they fit, else int32.

    Example:
        >>> encode_sets(torch.tensor([0, 1, -1])).tolist()
        [6, 10, 2]
    """
    codes = torch.where(sets < 0, _NONE, sets * _STEP + _OFFSET)
    most = int(codes.max()) if codes.numel() else 0
    dtype = torch.uint8 if most < 256 else torch.int32
    return codes.to(dtype)


def decode_sets(codes: Tensor) -> Tensor:
    """Inverse of `encode_sets`; int64 on the CPU. What averaging may have made of a code (one less) reads the same.

    Sets as they were stored before codes had gaps (numbers from 0 on, the type's largest value for none) are read too.

    Args:
        codes: from `encode_sets`, perhaps averaged.

    Returns:
        Set numbers of the same shape, int64 on the CPU, -1 for none.

    Example:
        >>> decode_sets(encode_sets(torch.tensor([0, 1, -1]))).tolist()
        [0, 1, -1]
    """
    raw = codes.detach().cpu()
    if bool((raw == 0).any()):
        return torch.where(raw == torch.iinfo(raw.dtype).max, -1, raw.long())
    return (raw.long() - 1).div(_STEP, rounding_mode="floor") - 1


@contextmanager
def real_values() -> Iterator[None]:
    """Compute with what tensors hold, whatever mode is on, and keep results that any mode can use.

    Returns:
        A context; nothing to use.

    Example:
        >>> with torch.inference_mode(), real_values():
        ...     torch.ones(1).is_inference()
        False
    """
    with without_modes(), torch.inference_mode(False):
        yield


class Seen:
    """Two set buffers, and how to tell that they still hold what they held.

    On the CPU the contents are compared, as a change through `.data` or by a collective has no version; on other
    devices, where that would wait for the device, the tensors' version counters.
    """

    __slots__ = ("cols", "refs", "rows", "versions")

    def __init__(self, row_set: Tensor, col_set: Tensor) -> None:
        self.rows = self.cols = None
        if row_set.is_cpu:
            self.rows, self.cols = row_set.clone(), col_set.clone()
        self.refs = weakref.ref(row_set), weakref.ref(col_set)
        self.versions = version(row_set), version(col_set)

    def holds(self, row_set: Tensor, col_set: Tensor) -> bool:
        """Whether these tensors hold the same sets."""
        if self.rows is not None and self.cols is not None and row_set.is_cpu:
            return torch.equal(self.rows, row_set) and torch.equal(self.cols, col_set)
        same = self.refs[0]() is row_set and self.refs[1]() is col_set
        return same and self.versions == (version(row_set), version(col_set))


class _Known(Seen):
    __slots__ = ("topology",)

    def __init__(self, row_set: Tensor, col_set: Tensor, topology: BlockTopology) -> None:
        super().__init__(row_set, col_set)
        self.topology = topology


_KNOWN: dict[tuple[int, int], _Known] = {}
_MOST_KNOWN = 4096


def topology_of(row_set: Tensor, col_set: Tensor) -> BlockTopology:
    """The topology that two buffers of encoded sets describe: always of what they hold now (see `Seen`).

    Args:
        row_set: codes of the outputs, shape ``(m,)``.
        col_set: codes of the inputs, shape ``(n,)``.

    Returns:
        The `BlockTopology`, the same object for as long as the buffers hold the same.

    Example:
        >>> topology_of(encode_sets(torch.tensor([0, 1])), encode_sets(torch.tensor([1, 0]))).nnz
        2
    """
    key = id(row_set), id(col_set)
    known = _KNOWN.get(key)
    if known is None or not known.holds(row_set, col_set):
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        # Ordinary tensors, also within a function transform.
        with without_transforms():
            topology = BlockTopology(decode_sets(row_set), decode_sets(col_set))
            known = _KNOWN[key] = _Known(row_set, col_set, topology)
    return known.topology


def unwrapped(t: Tensor) -> Tensor:
    """What function transforms hold.

    Args:
        t: any tensor, perhaps within a function transform.

    Returns:
        An ordinary tensor; ``t`` itself outside of function transforms.

    Raises:
        RuntimeError: if those are several that differ.

    Example:
        >>> unwrapped(torch.ones(1)).tolist()
        [1.0]
    """
    while transforms_active() and is_wrapped(t):
        if is_batched(t):
            each = inner(t).movedim(batch_dim(t), 0)
            with without_transforms():
                if len(each) == 0 or bool((each != each[:1]).any()):
                    raise RuntimeError("torch.vmap over layers whose sets are uneven and differ: run them one by one")
                t = each[0]
        else:
            t = inner(t)
    return t
