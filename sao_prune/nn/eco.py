"""ECOConv2d: a convolution that is exactly orthogonal, dense or in blocks (thesis sections 2.5.2.3 and 3.4.4.2)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from .._torch import is_fake, is_wrapped
from ..seeds import Seed, base_seed, named_generator
from ..topology import BlockTopology, decode_sets, encode_sets, make_topology, real_values, topology_of, unwrapped
from ..weights import Blocks, eco_blocks

Size = int | tuple[int, int]


class InexactConvolutionWarning(UserWarning):
    """An ECO convolution on an input size for which it cannot be orthogonal."""


class ECOOptions(TypedDict, total=False):
    """Further options of `ECOConv2d`."""

    gain: float
    topology: str | BlockTopology
    seed: Seed
    device: torch.device | str | None
    dtype: torch.dtype | None


class ECOConv2d(nn.Conv2d):
    """An orthogonal convolution: dilated to fill its circular input, strided by space-to-depth.

    With ``groups > 1`` its kernels stand on a block topology and only they are stored and computed. The input size may
    vary; it is exact wherever the kernel size divides the size after striding, or the reverse, in both directions.
    Elsewhere the dilation is rounded down, a warning says so once for each size, and so does the repr. Train it freely
    and it drifts; `sao_prune.hold` keeps it orthogonal.

    Args:
        in_channels: channels in; semi-orthogonal if they are not as many as go out.
        out_channels: channels out.
        kernel_size: even or odd.
        stride: space-to-depth factor; it must divide the input size.
        groups: blocks of the topology between ``in_channels * stride^2`` and ``out_channels``; sets need not be even.
        input_size: height and width of the input, if known; otherwise the last one seen.
        **options: ``gain``, every singular value; ``topology``, ``"ramanujan"``, ``"interleaved"``, or one of shape
            ``(out_channels, in_channels * stride^2)``, which then decides the groups; ``seed``, of topology and values;
            ``device`` and ``dtype``.

    Shape:
        ``(batch, in_channels, h, w)`` to ``(batch, out_channels, h / stride, w / stride)``. ``weight`` is
        ``(out_channels, most inputs an output sees, *kernel_size)``, rows in the order of the topology's buckets. The
        buffers ``row_set`` and ``col_set`` are the topology (`sao_prune.topology.encode_sets`); the layer follows what
        they hold, whoever put it there, and what averages buffers does them no harm.

    Raises:
        ValueError: for sizes or groups out of range, or an input that the stride does not divide.

    Example:
        >>> import torch
        >>> layer = ECOConv2d(4, 8, 3, groups=2, bias=False, input_size=6, seed=0)
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(layer(x).norm(), x.norm(), rtol=1e-4)
        True
    """

    row_set: Tensor
    col_set: Tensor
    # Last known; what the buffers hold is what counts wherever they can be read.
    _topology: BlockTopology
    _row_index: Tensor
    _col_index: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: int = 1,
        groups: int = 1,
        input_size: Size | None = None,
        bias: bool = True,
        **options: Unpack[ECOOptions],
    ) -> None:
        if min(in_channels, out_channels, stride, *_pair(kernel_size)) < 1:
            raise ValueError(
                "channels, kernel_size and stride must be positive, got "
                f"{in_channels}, {out_channels}, {kernel_size} and {stride}"
            )
        unknown = set(options) - set(ECOOptions.__annotations__)
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}; known: {', '.join(ECOOptions.__annotations__)}")
        device, dtype = options.get("device") or torch.get_default_device(), options.get("dtype")
        super().__init__(in_channels * stride**2, out_channels, kernel_size, bias=False, device="meta", dtype=dtype)
        base, gain = base_seed(options.get("seed")), options.get("gain", 1.0)
        self.stride = (stride, stride)
        self.gain = gain
        self.input_size = None if input_size is None else _pair(input_size)
        self._warned: set[tuple[int, int]] = set()
        shape = (out_channels, in_channels * stride**2)
        made = _make(options.get("topology", "ramanujan"), shape, groups, named_generator(base, "topology"))
        self.register_buffer("row_set", encode_sets(made.row_set).to(device))
        self.register_buffer("col_set", encode_sets(made.col_set).to(device))
        self._adopt(made)
        (blocks,) = eco_blocks([made], [self._kernel], [named_generator(base, "values")], gain=gain)
        self.weight = nn.Parameter(pack(blocks, self._kernel).to(device, dtype or torch.get_default_dtype()))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))
        self.in_channels = in_channels
        if self.input_size is not None:
            self._check(self.input_size)

    @property
    def _kernel(self) -> tuple[int, int]:
        return self.kernel_size[0], self.kernel_size[1]

    @property
    def topology(self) -> BlockTopology:
        """Which outputs see which inputs, by what the buffers hold; while compiled as last known."""
        rows, cols = self.row_set, self.col_set
        if torch.compiler.is_compiling() or not type(rows) is type(cols) is Tensor or rows.is_meta:
            return self._topology
        with real_values():
            topology = topology_of(unwrapped(rows), unwrapped(cols))
            if topology is not self._topology or self._row_index.device != rows.device:
                self._adopt(topology)
        return topology

    def _adopt(self, topology: BlockTopology) -> None:
        """Derive what execution needs from a topology. These are no buffers: an average of indices is none."""
        device = self.row_set.device
        rows = torch.cat([b.rows.flatten() for b in topology.buckets])
        cols = torch.cat([b.cols.flatten() for b in topology.buckets])
        self.__dict__.update(
            _topology=topology,
            _row_index=torch.argsort(rows).to(device),
            _col_index=cols.to(device),
            groups=topology.groups,
        )

    def _indices(self) -> tuple[tuple[tuple[int, ...], ...], Tensor, Tensor]:
        """Shapes of the topology's buckets, the row of each output, and the input of each column."""
        rows, cols = self.row_set, self.col_set
        if not torch.compiler.is_compiling() and self._has_no_single_values(rows):
            # In one bucket, codes have the order of the sets.
            found = torch.argsort(torch.argsort(rows, stable=True), stable=True), torch.argsort(cols, stable=True)
            return tuple(b.shape for b in self._topology.buckets), *found
        shapes = tuple(b.shape for b in self.topology.buckets)
        return shapes, self._row_index, self._col_index

    def _has_no_single_values(self, codes: Tensor) -> bool:
        """Whether codes are those of several layers at once (which only regular ones can be), or only a shape."""
        several = is_wrapped(codes) and len(self._topology.buckets) == 1
        return several or codes.is_meta or is_fake(codes)

    def dense_weight(self) -> Tensor:
        """The kernel with its zeros, shape ``(out_channels, in_channels * stride^2, *kernel_size)``."""
        rows, cols = self.topology.shape
        out = self.weight.new_zeros(rows * cols, prod(self._kernel))
        for index, values in zip(self.topology.flat_index, unpack(self.weight, self.topology)):
            out[index.to(out.device)] = values.flatten(0, 2)
        return out.view(rows, cols, *self._kernel)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        self._check(size)
        self.input_size = size
        x = F.pixel_unshuffle(x, self.stride[0])
        height, width = _Fit(x.shape[-2], self._kernel[0]), _Fit(x.shape[-1], self._kernel[1])
        x = F.pad(x, (*width.padding, *height.padding), mode="circular")
        dilation = (height.dilation, width.dilation)
        if self.groups == 1:
            return F.conv2d(x, _fold(self.weight, (height, width)), self.bias, dilation=dilation)
        shapes, row_index, col_index = self._indices()
        x = x.index_select(1, col_index)
        outs = []
        columns = x.split([blocks * cols for blocks, _, cols in shapes], 1)
        rows = self.weight.split([blocks * rows for blocks, rows, _ in shapes])
        for part, weight, (blocks, _, cols) in zip(columns, rows, shapes):
            folded = _fold(weight[:, :cols], (height, width))
            outs.append(F.conv2d(part, folded, dilation=dilation, groups=blocks))
        y = (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).index_select(1, row_index)
        return y if self.bias is None else y + self.bias[:, None, None]

    def spectrum(self, size: Size | None = None) -> Tensor:
        """The layer as a matrix for every frequency of a circular input; their singular values are the layer's.

        Args:
            size: height and width of the input; the last one seen if left out, or else one that the kernel fits.

        Returns:
            One of each conjugate pair, complex, shape ``(frequencies, out_channels, in_channels * stride^2)``.

        Example:
            >>> layer = ECOConv2d(4, 8, 3, input_size=6, seed=0)
            >>> layer.spectrum().shape, layer.spectrum(8).shape
            (torch.Size([6, 8, 4]), torch.Size([40, 8, 4]))
        """
        fitting = (self._kernel[0] * self.stride[0], self._kernel[1] * self.stride[0])
        height, width = self.input_size or fitting if size is None else _pair(size)
        fits = _Fit(height // self.stride[0], self._kernel[0]), _Fit(width // self.stride[0], self._kernel[1])
        kernel = _fold(self.dense_weight(), fits)
        for dim, fit in zip((2, 3), fits):
            if fit.taps * fit.dilation < fit.n:
                shape = [*kernel.shape]
                shape[dim] = fit.n
                places = fit.dilation * torch.arange(fit.taps, device=kernel.device)
                kernel = kernel.new_zeros(shape).index_add(dim, places, kernel)
        return torch.fft.rfft2(kernel).flatten(2).movedim(-1, 0)

    def exact_at(self, size: Size) -> bool:
        """Whether the layer is orthogonal on inputs of this height and width."""
        sizes = zip(_pair(size), self._kernel)
        return all(n % self.stride[0] == 0 and _divides(n // self.stride[0], k) for n, k in sizes)

    def _check(self, size: tuple[int, int]) -> None:
        if any(n % self.stride[0] for n in size):
            raise ValueError(
                f"stride {self.stride[0]} must divide the input size, got {size[0]} x {size[1]}; pad or crop the input"
            )
        if self.exact_at(size) or size in self._warned:
            return
        self._warned.add(size)
        after = tuple(n // self.stride[0] for n in size)
        warnings.warn(
            f"ECOConv2d cannot be orthogonal on a {size[0]} x {size[1]} input: kernel size {self._kernel} does not "
            f"divide {after} (the size after striding); choose an input size that it divides",
            InexactConvolutionWarning,
            stacklevel=3,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = f"{prefix}row_set", f"{prefix}col_set"
        if all(isinstance(state_dict.get(name), Tensor) and not state_dict[name].is_meta for name in names):
            # Anew, so that sets of an average or of an earlier format are stored exactly, in the type that they need.
            state_dict = {**state_dict, **{name: encode_sets(decode_sets(state_dict[name])) for name in names}}
            for name in ("row_set", "col_set"):
                new, own = state_dict[prefix + name], self._buffers[name]
                if own is not None and own.shape == new.shape and own.dtype != new.dtype:
                    self._buffers[name] = torch.empty_like(new, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        _ = self.topology

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self._kernel}, stride={self.stride[0]}"]
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += ["bias=False"] if self.bias is None else []
        if self.input_size is None:
            parts.append("input_size=not seen yet")
        else:
            exact = "exact" if self.exact_at(self.input_size) else "NOT orthogonal at this size"
            parts.append(f"input_size={self.input_size}, {exact}")
        return ", ".join(parts)


def _make(
    topology: str | BlockTopology, shape: tuple[int, int], groups: int, generator: torch.Generator
) -> BlockTopology:
    if isinstance(topology, str):
        return make_topology(topology, *shape, groups=groups, generator=generator)
    if topology.shape != shape or -1 in topology.row_set or -1 in topology.col_set:
        raise ValueError(f"the layer needs a topology of shape {shape} that joins every channel, got {topology}")
    return topology


def pack(blocks: Blocks, kernel: tuple[int, ...]) -> Tensor:
    """Block values ``(blocks, r, c, taps)``, one tensor a bucket, as the ``weight`` of an `ECOConv2d`."""
    widest = max(b.shape[2] for b in blocks)
    rows = [F.pad(b, (0, 0, 0, widest - b.shape[2])).flatten(0, 1) for b in blocks]
    return torch.cat(rows).unflatten(-1, kernel)


def unpack(weight: Tensor, topology: BlockTopology) -> Blocks:
    """The block values ``(blocks, r, c, taps)`` in the ``weight`` of an `ECOConv2d`; inverse of `pack`."""
    shapes = [b.shape for b in topology.buckets]
    parts = weight.flatten(2).split([blocks * rows for blocks, rows, _ in shapes])
    return tuple(p[:, : s[2]].unflatten(0, s[:2]) for p, s in zip(parts, shapes))


@dataclass(frozen=True)
class _Fit:
    """How a kernel of ``k`` taps lies on ``n`` circular positions."""

    n: int
    k: int

    @property
    def taps(self) -> int:
        return min(self.n, self.k)

    @property
    def dilation(self) -> int:
        return max(self.n // self.k, 1)

    @property
    def padding(self) -> tuple[int, int]:
        reach = self.dilation * (self.taps - 1)
        return reach // 2, reach - reach // 2


def _fold(weight: Tensor, fits: tuple[_Fit, _Fit]) -> Tensor:
    """Add up the taps that fall on one position where the kernel is longer than its circular input."""
    for dim, fit in zip((2, 3), fits):
        k = weight.shape[dim]
        if fit.taps < k:
            places = torch.arange(k, device=weight.device) % fit.taps
            shape = [*weight.shape]
            shape[dim] = fit.taps
            weight = weight.new_zeros(shape).index_add(dim, places, weight)
    return weight


def _divides(n: int, k: int) -> bool:
    return n % k == 0 or k % n == 0


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
