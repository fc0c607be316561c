"""Small files in the formats of the real sets."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sao_prune.lab.data import checksum, cifar


def idx_bytes(values: torch.Tensor) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


def write_idx_set(folder: Path, labels: list[int], size: int = 28) -> torch.Tensor:
    """The four files of a set in MNIST's format, test part equal to the training part; returns its images."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(labels), size, size), dtype=torch.uint8, generator=generator)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.tensor(labels, dtype=torch.uint8)))
    return images


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2 wrote it, with byte strings and numpy 1's names, like the published CIFAR files."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, str | bytes):
        raw = value.encode() if isinstance(value, str) else value
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_python2, value)) + b"t"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    dtype = b"cnumpy\ndtype\n" + _python2((value.dtype.str[1:], 0, 1)) + b"R" + b"(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _python2((0,)) + b"U\x01btR"
    shape, raw = _python2(value.shape), _python2(value.tobytes("F" if fortran else "C"))
    return made + b"(K\x01" + shape + dtype + _python2(fortran) + raw + b"tb"


@pytest.fixture
def unknown_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file has a published checksum, so that small ones can stand in."""
    monkeypatch.setattr(checksum, "_SHA256", {})
    published = cifar._Cifar.checksums.fget
    monkeypatch.setattr(cifar._Cifar, "checksums", property(lambda spec: dict.fromkeys(published(spec))))


@pytest.fixture
def write_images() -> Callable[..., None]:
    """Write one image file a colour, named 0, 1, ..: ``write(folder, [(red, green, blue), ..], size=(w, h))``."""
    from PIL import Image

    def write(folder: Path, colours: list[Any], size: tuple[int, int] = (32, 32), ending: str = "png") -> None:
        folder.mkdir(parents=True)
        for i, colour in enumerate(colours):
            Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(folder / f"{i}.{ending}")

    return write
