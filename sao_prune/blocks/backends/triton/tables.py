"""Tables of channels, looked at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a block weight: which channel each of its ``groups * size`` positions is.

    Attributes:
        kind: ``identity``, ``strided`` (item ``i`` of group ``g`` is channel ``i * groups + g``) or ``index``.
        table: int32, -1 where a position is padding.
        missing: channels that no position is; ``None`` if there are none.
    """

    kind: str
    table: Tensor
    groups: int
    size: int
    channels: int
    missing: Tensor | None


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def side_of(table: Tensor, groups: int, channels: int) -> Side:
    """What a table of ``(groups * size,)`` positions is.

    Raises:
        ValueError: a table that is not int32, of another length, names a channel twice, or one that does not exist.

    Example:
        >>> side_of(torch.tensor([0, 2, 1, 3], dtype=torch.int32), groups=2, channels=4).kind
        'strided'
        >>> side_of(torch.tensor([3, 0, 1, -1], dtype=torch.int32), groups=2, channels=5).missing
        tensor([2, 4])
    """
    known = _KNOWN.setdefault(table, {})
    key = (groups, channels, table._version)
    if key not in known:
        known[key] = _look(table, groups, channels)
    kind, missing = known[key]
    # The table itself is not among the values: an entry that held its own key would never go.
    return Side(kind, table, groups, len(table) // groups, channels, missing)


def table_of(sets: Tensor, groups: int) -> Tensor:
    """The table of a side whose channels belong to ``sets``, -1 to none; smaller sets are padded.

    Example:
        >>> table_of(torch.tensor([0, 1, 0, -1, 1, 0]), groups=2)
        tensor([ 0,  2,  5,  1,  4, -1], dtype=torch.int32)
    """
    counts = torch.bincount(sets[sets >= 0], minlength=groups)
    table = torch.full((groups, int(counts.max())), -1, dtype=torch.int32)
    for group in range(groups):
        members = torch.nonzero(sets == group).flatten()
        table[group, : len(members)] = members.int()
    return table.flatten()


def _look(table: Tensor, groups: int, channels: int) -> tuple[str, Tensor | None]:
    if table.dtype is not torch.int32 or table.dim() != 1 or len(table) % groups or not table.is_contiguous():
        raise ValueError(
            f"a table of channels is int32, contiguous, of shape (groups * size,) with {groups} groups; got "
            f"{table.dtype} of shape {tuple(table.shape)}"
        )
    cpu = table.detach().cpu().long()
    real = cpu[cpu != -1]
    if len(real) and not 0 <= int(real.min()) <= int(real.max()) < channels:
        raise ValueError(f"a table names channels {int(real.min())} to {int(real.max())} of {channels}")
    counts = torch.bincount(real, minlength=channels)
    if int(counts.max()) > 1:
        raise ValueError(f"a table names channel {int(counts.argmax())} {int(counts.max())} times; once is allowed")
    missing = torch.nonzero(counts == 0).flatten()
    natural = torch.arange(len(cpu))
    kind = "index"
    if torch.equal(cpu, natural):
        kind = "identity"
    elif torch.equal(cpu, natural.view(-1, groups).t().flatten()):
        kind = "strided"
    return kind, missing.to(table.device) if len(missing) else None
