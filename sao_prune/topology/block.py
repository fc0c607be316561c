"""The block topology: outputs and inputs split into the same number of sets, joined set by set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class NotBlockStructuredError(ValueError):
    """A mask whose connected components are not complete blocks."""


@dataclass(frozen=True)
class Bucket:
    """All blocks of one shape: ``rows`` is ``(blocks, r)``, ``cols`` is ``(blocks, c)``, ``sets`` their numbers."""

    sets: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(blocks, rows a block, columns a block)``."""
        return self.rows.shape[0], self.rows.shape[1], self.cols.shape[1]


@dataclass(frozen=True, eq=False)
class BlockTopology:
    """Which outputs see which inputs: ``r`` sees ``c`` iff ``row_set[r] == col_set[c]``.

    Permuting rows and columns makes the mask block-diagonal with all-ones blocks (thesis section 3.4.1).
    Sets are numbered by their first row; a row or column that nothing is joined to has set number -1. Two
    topologies are equal when their masks are.

    Args:
        row_set: set number of every output, shape ``(m,)``, integers.
        col_set: set number of every input, shape ``(n,)``, integers.

    Raises:
        ValueError: if either is not a non-empty 1-D integer tensor.

    Example:
        >>> import torch
        >>> t = BlockTopology(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
        >>> t.mask().int().tolist()
        [[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]
        >>> t.groups, t.nnz, t.sparsity
        (2, 8, 0.5)
    """

    row_set: Tensor
    col_set: Tensor

    def __post_init__(self) -> None:
        for side, sets in (("row_set", self.row_set), ("col_set", self.col_set)):
            integers = not (sets.is_floating_point() or sets.is_complex() or sets.dtype == torch.bool)
            if sets.dim() != 1 or sets.numel() == 0 or not integers:
                raise ValueError(
                    f"{side} must be a non-empty 1-D integer tensor, got shape {tuple(sets.shape)} {sets.dtype}"
                )
        row_set, col_set = _canonical(self.row_set.cpu().long(), self.col_set.cpu().long())
        object.__setattr__(self, "row_set", row_set)
        object.__setattr__(self, "col_set", col_set)

    @property
    def shape(self) -> tuple[int, int]:
        """``(outputs, inputs)``."""
        return self.row_set.numel(), self.col_set.numel()

    @cached_property
    def groups(self) -> int:
        """How many blocks there are."""
        return int(self.row_set.max()) + 1

    @cached_property
    def row_sizes(self) -> Tensor:
        """Outputs in each set, shape ``(groups,)``."""
        return torch.bincount(self.row_set[self.row_set >= 0], minlength=self.groups)

    @cached_property
    def col_sizes(self) -> Tensor:
        """Inputs in each set, shape ``(groups,)``."""
        return torch.bincount(self.col_set[self.col_set >= 0], minlength=self.groups)

    @cached_property
    def row_order(self) -> Tensor:
        """The connected outputs, set after set: ``weight[row_order][:, col_order]`` is block-diagonal."""
        return torch.argsort(self.row_set, stable=True)[int((self.row_set < 0).sum()) :]

    @cached_property
    def col_order(self) -> Tensor:
        """The connected inputs, set after set."""
        return torch.argsort(self.col_set, stable=True)[int((self.col_set < 0).sum()) :]

    @property
    def degrees(self) -> tuple[Tensor, Tensor]:
        """Inputs seen by every output, shape ``(m,)``, and outputs fed by every input, shape ``(n,)``."""
        padded_cols = torch.cat([self.col_sizes, self.col_sizes.new_zeros(1)])
        padded_rows = torch.cat([self.row_sizes, self.row_sizes.new_zeros(1)])
        return padded_cols[self.row_set], padded_rows[self.col_set]

    @cached_property
    def nnz(self) -> int:
        """Number of edges, ``sum |R_i| |C_i|``."""
        return int((self.row_sizes * self.col_sizes).sum())

    @property
    def sparsity(self) -> float:
        """Share of absent edges, ``1 - nnz / (m n)``."""
        rows, cols = self.shape
        return 1 - self.nnz / (rows * cols)

    @property
    def is_regular(self) -> bool:
        """Whether all outputs have one degree and all inputs have one degree: (c, d)-regular."""
        return all(bool((degree == degree[0]).all()) for degree in self.degrees)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The blocks, gathered by shape, so that equal shapes are one batched operation."""
        row_start = self.row_sizes.cumsum(0) - self.row_sizes
        col_start = self.col_sizes.cumsum(0) - self.col_sizes
        shapes, member = torch.unique(torch.stack([self.row_sizes, self.col_sizes], 1), dim=0, return_inverse=True)
        buckets = []
        for index, (rows, cols) in enumerate(shapes.tolist()):
            sets = torch.nonzero(member == index).flatten()
            buckets.append(
                Bucket(
                    sets,
                    self.row_order[row_start[sets, None] + torch.arange(rows, device="cpu")],
                    self.col_order[col_start[sets, None] + torch.arange(cols, device="cpu")],
                )
            )
        return tuple(buckets)

    @cached_property
    def flat_index(self) -> tuple[Tensor, ...]:
        """For every bucket the positions of its entries in the flattened ``(m, n)`` matrix."""
        cols = self.shape[1]
        return tuple((b.rows[:, :, None] * cols + b.cols[:, None, :]).flatten() for b in self.buckets)

    def mask(self, dtype: torch.dtype = torch.bool, device: torch.device | str = "cpu") -> Tensor:
        """The ``(m, n)`` matrix of ones where an edge is and zeros elsewhere."""
        out = torch.zeros(self.shape[0] * self.shape[1], dtype=dtype, device=device)
        for index in self.flat_index:
            out[index.to(out.device)] = 1
        return out.view(self.shape)

    def scatter(self, blocks: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
        """Write block values, one ``(blocks, r, c)`` tensor a bucket, into an ``(m, n)`` matrix; zeros elsewhere."""
        if out is None:
            like = blocks[0] if blocks else torch.empty(0, dtype=torch.float32, device="cpu")
            out = like.new_empty(self.shape)
        out.zero_()
        flat = out.view(-1)
        for index, values in zip(self.flat_index, blocks):
            flat[index.to(out.device)] = values.reshape(-1).to(out)
        return out

    def gather(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The block values of an ``(m, n)`` matrix, one ``(blocks, r, c)`` tensor a bucket."""
        flat = matrix.reshape(-1)
        return tuple(flat[i.to(flat.device)].view(b.shape) for i, b in zip(self.flat_index, self.buckets))

    def spectrum(self) -> Tensor:
        """Singular values of the mask, descending: ``sqrt(|R_i| |C_i|)`` a block, then zeros (thesis 4.1.1)."""
        values = torch.zeros(min(self.shape), dtype=torch.float64, device="cpu")
        values[: self.groups] = (self.row_sizes * self.col_sizes).double().sqrt().sort(descending=True).values
        return values

    def transpose(self) -> BlockTopology:
        """The same edges seen from the other side, shape ``(n, m)``."""
        return BlockTopology(self.col_set, self.row_set)

    def crop(self, rows: int, cols: int) -> BlockTopology:
        """Keep the first ``rows`` outputs and ``cols`` inputs (thesis section 3.5.3.1, MLP-7's first layer).

        Raises:
            ValueError: if it has fewer.
        """
        if not (1 <= rows <= self.shape[0] and 1 <= cols <= self.shape[1]):
            raise ValueError(f"cannot crop a {self.shape[0]} x {self.shape[1]} topology to {rows} x {cols}")
        return BlockTopology(self.row_set[:rows], self.col_set[:cols])

    @classmethod
    def from_mask(cls, mask: Tensor) -> BlockTopology:
        """Read a topology back from a 0/1 matrix: its blocks are the connected components.

        Args:
            mask: shape ``(m, n)``; any dtype holding zeros and ones.

        Raises:
            ValueError: if the mask is not a 2-D matrix of zeros and ones.
            NotBlockStructuredError: if a component is not a complete block.

        Example:
            >>> import torch
            >>> t = BlockTopology(torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 0, 0]))
            >>> BlockTopology.from_mask(t.mask()) == t
            True
        """
        if mask.dim() != 2 or mask.numel() == 0:
            raise ValueError(f"a mask is a non-empty 2-D matrix of zeros and ones, got shape {tuple(mask.shape)}")
        edges = (mask != 0).cpu()
        if mask.dtype != torch.bool and not torch.equal(edges.to(mask.dtype), mask.detach().cpu()):
            raise ValueError("a mask holds only zeros and ones; got other values (a weight? pass `weight != 0`)")
        # numpy stops at the first edge of a row; the first row of a block then tells all the block's columns.
        first_col = torch.from_numpy(edges.numpy().argmax(1))
        occupied = edges.any(1)
        row_set = torch.where(occupied, first_col, -1)
        labels, of_row = first_col[occupied].unique(return_inverse=True)
        rows = occupied.nonzero().flatten()
        first_row = rows.new_full((labels.numel(),), mask.shape[0]).scatter_reduce_(0, of_row, rows, "amin")
        seen = edges[first_row]
        col_set = torch.full((mask.shape[1],), -1, device="cpu")
        if labels.numel():
            col_set = torch.where(seen.any(0), labels[seen.int().argmax(0)], col_set)
        complete = (row_set.int()[:, None] == col_set.int()) & (row_set[:, None] >= 0)
        if not torch.equal(complete, edges):
            row = int((complete != edges).any(1).nonzero()[0])
            raise NotBlockStructuredError(
                f"the mask is not made of complete blocks: output {row} shares some of its inputs with outputs "
                "that see others; block execution needs a mask from SAO or RG (or one with the same structure)"
            )
        if not bool(edges.any()):
            return cls(first_col.new_full((mask.shape[0],), -1), first_col.new_full((mask.shape[1],), -1))
        return cls(row_set, col_set)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockTopology):
            return NotImplemented
        return torch.equal(self.row_set, other.row_set) and torch.equal(self.col_set, other.col_set)

    def __hash__(self) -> int:
        return hash((self.row_set.numpy().tobytes(), self.col_set.numpy().tobytes()))

    def __repr__(self) -> str:
        rows, cols = self.shape
        return f"BlockTopology({rows} x {cols}, groups={self.groups}, sparsity={self.sparsity:.4%})"


def _canonical(row_set: Tensor, col_set: Tensor) -> tuple[Tensor, Tensor]:
    """Number the sets that have both rows and columns by their first row; all else becomes -1."""
    labels = max(int(row_set.max()), int(col_set.max()), -1) + 1
    if labels == 0:
        return row_set.clamp(max=-1, min=-1), col_set.clamp(max=-1, min=-1)
    rows = row_set.numel()
    first = row_set.new_full((labels,), rows)
    seen = row_set >= 0
    first.scatter_reduce_(0, row_set[seen], torch.arange(rows, device="cpu")[seen], "amin")
    has_cols = torch.bincount(col_set[col_set >= 0], minlength=labels) > 0
    alive = (first < rows) & has_cols
    rank = torch.argsort(torch.argsort(torch.where(alive, first, rows)))
    rank = torch.cat([torch.where(alive, rank, -1), row_set.new_full((1,), -1)])
    return rank[row_set.clamp(min=-1)], rank[col_set.clamp(min=-1)]
