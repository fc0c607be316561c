"""Tile sizes worth trying for a shape, most promising first, by a model of what limits a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

# Elements that a thread may hold: accumulators, and loads of an operand. Loads by a table pass through registers, one
# address each; others are copied to shared memory as they are.
_HELD = 64
_LOADED = {"identity": 64, "strided": 64, "index": 16}
# Bytes in flight of one operand tile; shared memory holds both operands, once a stage.
_SHARED = 96 * 1024
# Bytes that neighbouring tiles of one program find in its first-level cache.
_NEAR = 64 * 1024
# Bytes a microsecond from the second-level cache, products a microsecond: a model's, to rank by.
_BYTES, _PRODUCTS, _SECTOR = 4e6, 2e8, 32
_TRIED = 4


@dataclass(frozen=True)
class Tile:
    """``BM`` rows; ``Q`` products of ``P`` groups; ``BR`` outputs and ``BC`` inputs of each group.

    ``registers`` is how many a thread may use; 0 leaves it to the assembler, which may spill for more programs at once.
    """

    BM: int
    BR: int
    BC: int
    Q: int
    P: int
    SWEEP: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def packed(self) -> int:
        """Groups."""
        return self.Q * self.P

    @property
    def roomy(self) -> Tile:
        """The same with all registers there are, for one that spills."""
        return replace(self, registers=255)


@dataclass(frozen=True)
class Work:
    """What has to be done: ``rows`` times ``groups`` products of ``r x c``, ``taps`` times; ``plain``: no more."""

    rows: int
    groups: int
    r: int
    c: int
    taps: int
    inputs: str
    outputs: str
    bytes: int
    processors: int
    plain: bool = True


def power(n: int) -> int:
    """The least power of two that is at least ``n``.

    Example:
        >>> power(1), power(12), power(16)
        (1, 16, 16)
    """
    return 1 << max(0, n - 1).bit_length()


def product_tiles(work: Work) -> list[Tile]:
    """For `kernels.product`.

    Example:
        >>> tile = product_tiles(Work(4096, 32, 128, 128, 1, "strided", "identity", 2, 132))[0]
        >>> tile.P, tile.Q >= 8  # one group a product; enough groups side by side to fill a sector
        (1, True)
    """
    found = []
    for q, p, br, bc in _shapes(work):
        columns = -(-work.groups // (q * p)) * -(-work.r // br)
        for bm in (16, 32, 64, 128):
            sizes = q * bm * p * br, q * p * bm * bc, q * p * bc * p * br
            warps = _warps(q, *sizes, work.inputs, _held(work, br, bc))
            if not warps or (bm > 16 and bm >= 2 * work.rows):
                continue
            stages = _stages(work.bytes * q * p * bc * (bm + p * br))
            if stages < 2:  # nothing is loaded while something is multiplied
                continue
            near = bm * work.groups * work.c * work.bytes <= _NEAR
            sweeps = {1, columns} if work.inputs == "index" and near else {1}
            found += [Tile(bm, br, bc, q, p, sweep, warps, stages) for sweep in sorted(sweeps)]
    return sorted(found, key=lambda tile: (_product_cost(tile, work), astuple(tile)))[:_TRIED]


def weight_tiles(work: Work) -> list[Tile]:
    """For `kernels.weight_gradient`.

    Example:
        >>> len({t.BM for t in weight_tiles(Work(4096, 32, 128, 128, 1, "strided", "identity", 2, 132))}) > 0
        True
    """
    found = []
    for q, p, br, bc in _shapes(work):
        for bm in (16, 32, 64, 128):
            sizes = q * p * br * p * bc, q * p * bm * max(br, bc), q * p * bm * min(br, bc)
            kind = "index" if work.inputs == "index" else work.outputs
            warps = _warps(q, *sizes, kind, (_HELD, _HELD))
            if not warps or (bm > 16 and bm >= 2 * work.rows):
                continue
            found.append(Tile(bm, br, bc, q, p, 1, warps, _stages(work.bytes * q * p * bm * (br + bc))))
    return sorted(found, key=lambda tile: (_weight_cost(tile, work), astuple(tile)))[:_TRIED]


def parts(tile: Tile, work: Work) -> int:
    """How many ranges of rows a weight's gradient is summed over apart: enough programs to fill the device."""
    columns = -(-work.groups // tile.packed) * -(-work.r // tile.BR) * -(-work.c // tile.BC) * work.taps
    return max(1, min(-(-2 * work.processors // columns), work.rows // (4 * tile.BM), 64))


def _shapes(work: Work) -> Iterator[tuple[int, int, int, int]]:
    most = power(work.groups)
    deep = 16 if work.bytes == 2 else 8
    for q, p in product((1, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
        if q * p > most:
            continue
        for br, bc in product((1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64)):
            # Both sides of a product fill a tensor-core tile, with one group, with several, or with zeros.
            if p * bc < deep or p * br < 8:
                continue
            if br > max(power(work.r), 8 // p) or bc > max(power(work.c), deep // p):
                continue
            # Smaller pieces of a block only reread the other side.
            if br < min(power(work.r), 32) or bc < min(power(work.c), 16):
                continue
            # Several groups in one product only if one alone leaves it half empty.
            if p > 1 and min(br, bc) * p > 16 and p * min(work.r, work.c) > 16:
                continue
            yield q, p, br, bc


def _held(work: Work, br: int, bc: int) -> tuple[int, int]:
    """Accumulators a thread may hold, of 4 warps and of 8; by what the assembler reported of spills."""
    whole = work.r == power(work.r) and work.c == power(work.c)
    if not whole and br < 32:
        return _HELD // 2, _HELD // 2  # masks take registers, too
    # More only where nothing but products happens. Two programs of four warps are better than one of eight that holds
    # twice as much, so the smaller ones hold as much as before.
    roomy = whole and work.plain and work.inputs != "index" and bc == 16
    return _HELD, _HELD * (2 if roomy else 1)


def _warps(q: int, accumulators: int, loaded: int, other: int, kind: str, held: tuple[int, int]) -> int:
    """Warps that hold the accumulators and what is loaded of both operands; 0 if none do."""
    for warps, limit in zip((4, 8), held):
        threads = 32 * warps
        fits = loaded <= threads * _LOADED[kind] and other <= threads * _LOADED["identity"]
        # Each product of a batch has a warp of its own.
        if (q == 1 or warps <= q) and accumulators <= threads * limit and fits:
            return warps
    return 0


def _stages(size: int) -> int:
    return max(1, min(4, _SHARED // max(size, 1)))


def _waste(kind: str, tile: Tile, size: int, width: int) -> float:
    """Bytes moved for a byte of use."""
    if kind == "index":
        return _SECTOR / size
    run = tile.packed if kind == "strided" else max(width, 1)
    return max(1.0, _SECTOR / (run * size))


def _product_cost(tile: Tile, work: Work) -> float:
    tiles, chunks = -(-work.groups // tile.packed), -(-work.r // tile.BR)
    steps = -(-work.c // tile.BC)
    rows = -(-work.rows // tile.BM) * tile.BM
    near = tile.SWEEP > 1
    read = float(rows * work.groups * work.c * work.bytes * work.taps)
    # In the first-level cache a permuted read costs its instructions, about a quarter of a sector.
    read *= 4.0 if near else _waste(work.inputs, tile, work.bytes, min(work.c, tile.BC)) * chunks
    written = rows * work.groups * work.r * work.bytes * _waste(work.outputs, tile, work.bytes, work.r)
    weights = rows / tile.BM * work.groups * work.r * work.c * work.taps * work.bytes
    padded = tiles * tile.Q * chunks * steps * tile.P**2 * tile.BR * max(tile.BC, 1)
    programs = -(-work.rows // tile.BM) * tiles * chunks / tile.SWEEP
    idle = max(1.0, 2 * work.processors / programs)
    return idle * ((read + written + weights) / _BYTES + rows * padded * work.taps / _PRODUCTS)


def _weight_cost(tile: Tile, work: Work) -> float:
    tiles = -(-work.groups // tile.packed)
    r_chunks, c_chunks = -(-work.r // tile.BR), -(-work.c // tile.BC)
    x = 1.0 * work.rows * work.groups * work.c * work.bytes * r_chunks * work.taps
    g = 1.0 * work.rows * work.groups * work.r * work.bytes * c_chunks * work.taps
    x *= _waste(work.inputs, tile, work.bytes, min(work.c, tile.BC))
    g *= _waste(work.outputs, tile, work.bytes, min(work.r, tile.BR))
    apart = parts(tile, work)
    sums = 2 * 4 * apart * work.groups * work.r * work.c * work.taps
    padded = tiles * tile.Q * r_chunks * c_chunks * tile.P**2 * tile.BR * tile.BC
    idle = max(1.0, 2 * work.processors / (tiles * r_chunks * c_chunks * work.taps * apart))
    return idle * ((x + g) / _BYTES + work.rows * padded * work.taps / _PRODUCTS) + sums / _BYTES
