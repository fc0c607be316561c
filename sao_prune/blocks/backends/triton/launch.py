"""From tensors to the arguments of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import tuning
from .suits import interpreted
from .tables import Side
from .tiles import Tile, Work, parts, power, product_tiles, weight_tiles


@dataclass(frozen=True)
class Window:
    """What a convolution's kernel covers: size, stride, padding and dilation, each ``(vertical, horizontal)``."""

    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        """Weights of one channel."""
        return self.size[0] * self.size[1]

    def result(self, height: int, width: int) -> tuple[int, int]:
        """Size of the result for an image."""
        sizes = zip((height, width), self.size, self.stride, self.padding, self.dilation)
        h, w = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return h, w

    def constants(self, conv: bool) -> dict[str, object]:
        """The kernel's names for these."""
        (sh, sw), (ph, pw), (dh, dw) = self.stride, self.padding, self.dilation
        names = ("TAPS", "KW", "SH", "SW", "PH", "PW", "DH", "DW", "CONV")
        return dict(zip(names, (self.taps, self.size[1], sh, sw, ph, pw, dh, dw, conv)))


@dataclass(frozen=True)
class Source:
    """What a product reads: values, or a gradient beside what the activation after it left for its derivative."""

    values: Tensor
    saved: Tensor | None = None
    derivative: str = ""

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of images, rows and columns of pixels."""
        x = self.values
        return (x.stride(0), x.stride(2), x.stride(3)) if x.dim() == 4 else (0, x.stride(0), 0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        x = self.values
        return (x.shape[2], x.shape[3]) if x.dim() == 4 else (1, 1)


@dataclass(frozen=True)
class Epilogue:
    """What joins a product: a bias, an activation, and where its derivative is kept."""

    bias: Tensor | None = None
    activation: str = ""
    keep: Tensor | None = None


Arguments = tuple[dict[str, object], dict[str, object], Work]


def product_arguments(
    source: Source,
    weight: Tensor,
    y: Tensor,
    ins: Side,
    outs: Side,
    window: Window,
    epilogue: Epilogue,
    transposed: bool,
) -> Arguments:
    """Run-time arguments, constants and work of `kernels.product`; ``transposed`` for the gradient of an input."""
    x, conv = source.values, y.dim() == 4
    groups, r, c = weight.shape[:3]
    taps = window.taps
    w_out, w_in = (1, c) if transposed else (c, 1)
    if taps > 1:
        # Weights of a tap side by side: a copy as small as a weight, for loads of 16 bytes.
        weight = weight.movedim((3, 4), (0, 1)).contiguous()
    rows = y.numel() // y.shape[1]
    x_height, x_width = source.size
    y_height, y_width = (y.shape[2], y.shape[3]) if conv else (1, 1)
    x_image, x_row, x_column = source.strides
    saved = source.saved
    run_time = {
        "x": x,
        "x_saved": x if saved is None else saved,
        "weight": weight,
        "bias": weight if epilogue.bias is None else epilogue.bias,
        "y": y,
        "y_saved": y if epilogue.keep is None else epilogue.keep,
        "inputs": ins.table,
        "outputs": outs.table,
        "rows": rows,
        "y_channels": y.shape[1],
        "x_height": x_height,
        "x_width": x_width,
        "y_height": y_height,
        "y_width": y_width,
        "x_image": x_image,
        "x_row": x_row,
        "x_column": x_column,
        "s_channels": x.shape[1],
        "w_group": r * c,
        "w_out": w_out,
        "w_in": w_in,
        "w_tap": groups * r * c,
    }
    constants = {
        **{"GROUPS": ins.groups, "R": outs.size, "C": ins.size},
        **window.constants(conv),
        **{"TRANSPOSED": transposed, "IN": ins.kind, "OUT": outs.kind, "BIAS": epilogue.bias is not None},
        **{"ACTIVATION": epilogue.activation, "KEEP": epilogue.keep is not None, "DERIVATIVE": source.derivative},
        "PRECISION": precision(x.dtype, conv),
    }
    plain = not epilogue.activation and not source.derivative
    return run_time, constants, _work(x, rows, ins, outs, taps, plain)


def launch_product(
    source: Source,
    weight: Tensor,
    y: Tensor,
    ins: Side,
    outs: Side,
    window: Window,
    epilogue: Epilogue,
    transposed: bool = False,
) -> None:
    """Write every channel of ``y`` that a position of ``outs`` is."""
    from . import kernels

    run_time, constants, work = product_arguments(source, weight, y, ins, outs, window, epilogue, transposed)

    def run(tile: Tile) -> int:
        grid = (_product_programs(tile, work),)
        done = kernels.product[grid](**run_time, **constants, **tile_options(tile, sweep=True))
        return getattr(done, "n_spills", 0) or 0

    with _on(y):
        run(tuning.choose(_key("product", constants, work), product_tiles(work), run, y.device))


def weight_arguments(
    x: Source, grad: Source, weight: Tensor, bias: Tensor | None, ins: Side, outs: Side, window: Window
) -> Arguments:
    """Run-time arguments, constants and work of `kernels.weight_gradient`; ``weight`` and ``bias`` lack their parts."""
    g, conv = grad.values, x.values.dim() == 4
    rows = g.numel() // g.shape[1]
    (x_height, x_width), (y_height, y_width) = x.size, grad.size
    x_image, x_row, x_column = x.strides
    g_image, g_row, g_column = grad.strides
    run_time = {
        "x": x.values,
        "grad": g,
        "saved": g if grad.saved is None else grad.saved,
        "weight": weight,
        "bias": weight if bias is None else bias,
        "inputs": ins.table,
        "outputs": outs.table,
        "rows": rows,
        "rows_each": rows,
        "x_height": x_height,
        "x_width": x_width,
        "y_height": y_height,
        "y_width": y_width,
        "x_image": x_image,
        "x_row": x_row,
        "x_column": x_column,
        "g_image": g_image,
        "g_row": g_row,
        "g_column": g_column,
        "s_channels": g.shape[1],
        "w_part": weight.numel(),
        "b_part": 0 if bias is None else bias.numel(),
    }
    constants = {
        **{"GROUPS": ins.groups, "R": outs.size, "C": ins.size},
        **window.constants(conv),
        **{"IN": ins.kind, "OUT": outs.kind, "BIAS": bias is not None, "DERIVATIVE": grad.derivative},
        "PRECISION": precision(g.dtype, conv),
    }
    return run_time, constants, _work(g, rows, ins, outs, window.taps, not grad.derivative)


def launch_weight_gradient(
    x: Source, grad: Source, weight: Tensor, bias: Tensor | None, ins: Side, outs: Side, window: Window
) -> None:
    """Write the gradient of a weight, and those of a bias at every channel that a position of ``outs`` is.

    Rows are summed in parts, and the parts in their order: the same operands give the same bits.
    """
    from . import kernels

    run_time, constants, work = weight_arguments(x, grad, weight, bias, ins, outs, window)

    def run(tile: Tile) -> int:
        count = parts(tile, work)
        each = -(-work.rows // (count * tile.BM)) * tile.BM
        count = -(-work.rows // each)
        to: dict[str, object] = {"rows_each": each}
        sums = [(weight, "weight")] + ([] if bias is None else [(bias, "bias")])
        for gradient, name in sums:
            # Zeros, for channels that no position is.
            to[name] = gradient if count == 1 else gradient.new_zeros((count, *gradient.shape), dtype=torch.float32)
        grid = (_weight_programs(tile, work), count)
        done = kernels.weight_gradient[grid](**{**run_time, **to}, **constants, **tile_options(tile, sweep=False))
        if count > 1:
            for gradient, name in sums:
                apart = to[name]
                assert isinstance(apart, Tensor)
                gradient.copy_(apart.sum(0))
        return getattr(done, "n_spills", 0) or 0

    with _on(weight):
        run(tuning.choose(_key("weight", constants, work), weight_tiles(work), run, weight.device))


def _product_programs(tile: Tile, work: Work) -> int:
    """Programs of `kernels.product`."""
    columns = -(-work.groups // tile.packed) * -(-work.r // tile.BR)
    return -(-work.rows // tile.BM) * -(-columns // tile.SWEEP)


def _weight_programs(tile: Tile, work: Work) -> int:
    """Programs of `kernels.weight_gradient` for each part."""
    return -(-work.groups // tile.packed) * -(-work.r // tile.BR) * -(-work.c // tile.BC) * work.taps


def precision(dtype: torch.dtype, conv: bool) -> str:
    """How float32 is multiplied: as torch's own matrix products, or convolutions, are told to."""
    if dtype is not torch.float32:
        # The interpreter multiplies the bits of bfloat16 as integers; elsewhere the word has no meaning for halves.
        return "upcast" if dtype is torch.bfloat16 and interpreted() else "tf32"
    flags = torch.backends.cudnn if conv else torch.backends.cuda.matmul
    own = getattr(flags, "conv", flags) if conv else flags
    try:
        allowed = own.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9
        allowed = bool(flags.allow_tf32)
    return "tf32" if allowed else "ieee"


def _work(x: Tensor, rows: int, ins: Side, outs: Side, taps: int, plain: bool) -> Work:
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 1
    return Work(rows, ins.groups, outs.size, ins.size, taps, ins.kind, outs.kind, x.element_size(), processors, plain)


def _key(kernel: str, constants: dict[str, object], work: Work) -> tuple[object, ...]:
    # Batches of about one size share a choice.
    return kernel, power(work.rows), work.bytes, *constants.values()


def tile_options(tile: Tile, sweep: bool) -> dict[str, int]:
    """A kernel's names for the sizes of a tile; only one of them has ``SWEEP``."""
    sizes = {f.name: getattr(tile, f.name) for f in fields(tile) if f.name.isupper()}
    if not sweep:
        del sizes["SWEEP"]
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages, **limit}


@contextmanager
def _on(x: Tensor) -> Iterator[None]:
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        yield
