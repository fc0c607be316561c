"""The idx format of MNIST and its relatives: a magic number, the sizes, then unsigned bytes."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an idx file of unsigned bytes, gzipped or not.

    Args:
        path: the file; a gzip file is recognised by its content, not by its name.
        dims: how many dimensions it must have, 3 for images and 1 for labels.

    Returns:
        A uint8 tensor of the sizes in the header.

    Raises:
        DataError: if the file cannot be read, is not idx, holds another type or rank, or is shorter or longer than its
            header says.
    """
    return parse_idx(read_bytes(path), dims, path)


def parse_idx(raw: bytes, dims: int, path: Path) -> Tensor:
    """The same from the unpacked content of ``path``.

    Raises:
        DataError: if it is no file of this kind, or damaged.
    """
    header = 4 + 4 * dims
    if len(raw) < header:
        raise DataError(f"{path}: too short for an idx file of {dims} dimensions ({len(raw)} bytes); fetch it again")
    magic = int.from_bytes(raw[:4], "big")
    expected = _UNSIGNED_BYTE << 8 | dims
    if magic != expected:
        raise DataError(
            f"{path}: not an idx file of {dims}-dimensional bytes: magic {magic:#010x}, not {expected:#010x}"
        )
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(raw) - header != prod(shape):
        raise DataError(
            f"{path}: the header promises {prod(shape)} values, the file holds {len(raw) - header}; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzipped.

    Raises:
        DataError: if it cannot be read or unpacked.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from error
