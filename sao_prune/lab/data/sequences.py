"""Sequences: the copying task, and the characters of a text."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor

from ...seeds import named_generator
from ..errors import DataError
from .dataset import IGNORED, Dataset
from .source import DataSource, missing
from .spec import DataSpec

_SYMBOLS, _COPIED = 8, 10
_BLANK, _GO = _SYMBOLS, _SYMBOLS + 1
_TRAIN, _TEST = 10_000, 1_000
_LARGEST = 64 * 2**20


def read_sequences(spec: DataSpec, source: DataSource) -> Dataset:
    """The sequences of a specification, on the CPU.

    Args:
        spec: its name is ``copying`` or ``text:PATH``.
        source: where relative paths are looked for, beside the working directory.

    Returns:
        Tokens and a label a step.

    Raises:
        DataError: if a text is missing, too short or too large.

    Example:
        >>> data = read_sequences(DataSpec("copying", length=5, subset=3, test_subset=2), DataSource())
        >>> data.train_x.shape, data.tokens, len(data.classes)
        (torch.Size([3, 25]), 10, 8)
    """
    assert spec.length is not None
    if spec.name == "copying":
        sizes = spec.subset or _TRAIN, spec.test_subset or _TEST
        train, test = (_copying(count, spec.length, part) for count, part in zip(sizes, ("train", "test")))
        names = tuple("abcdefgh")
        return Dataset(spec.name, names, *train, *test, tokens=_SYMBOLS + 2)
    characters, codes = _coded(_text(Path(spec.name.partition(":")[2]), source))
    train, test = _windows(codes, spec)
    return Dataset(spec.name, characters, *train, *test, tokens=len(characters))


def _copying(count: int, blanks: int, part: str) -> tuple[Tensor, Tensor]:
    """Ten symbols to remember, blank steps, a sign, and ten steps in which to repeat them.

    As Arjovsky et al. (2016, https://arxiv.org/abs/1511.06464) have it, but that only the repeated symbols are asked
    for: chance is one in eight, ln 8 = 2.08 nats.
    """
    generator = named_generator(0, "copying", part)
    symbols = torch.randint(_SYMBOLS, (count, _COPIED), generator=generator)
    x = torch.full((count, _COPIED + blanks + _COPIED), _BLANK, dtype=torch.uint8)
    x[:, :_COPIED] = symbols.to(torch.uint8)
    x[:, -_COPIED - 1] = _GO
    y = torch.full(x.shape, IGNORED)
    y[:, -_COPIED:] = symbols
    return x, y


def _text(path: Path, source: DataSource) -> str:
    """A file, every ``.txt`` of a folder, or every ``.txt`` in a tar archive, in the order of their names."""
    places = [path] if path.is_absolute() else [path, *source.folders(str(path))]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise missing(f"the text {path}", places, "give a file, a folder of .txt files or a tar archive of them")
    if found.is_dir():
        files = sorted(found.glob("**/*.txt"))
        _check_size(found, sum(file.stat().st_size for file in files))
        parts = [file.read_bytes() for file in files]
    elif tarfile.is_tarfile(found):
        with tarfile.open(found) as archive:
            members = sorted((m for m in archive if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
            _check_size(found, sum(member.size for member in members))
            # Read in place: nothing of an archive is written to the disk.
            parts = [file.read() for member in members if (file := archive.extractfile(member)) is not None]
    else:
        _check_size(found, found.stat().st_size)
        parts = [found.read_bytes()]
    return "\n".join(part.decode("utf-8", errors="replace") for part in parts).replace("\r\n", "\n")


def _check_size(path: Path, size: int) -> None:
    if size > _LARGEST:
        raise DataError(f"{path} holds {size / 2**20:.0f} MiB of text; at most {_LARGEST // 2**20} MiB are read")


def _coded(text: str) -> tuple[tuple[str, ...], Tensor]:
    """The printable ASCII characters of a text, and the text as their indices; all others become ``?``."""
    plain = "".join(c if " " <= c <= "~" or c == "\n" else "?" for c in text)
    characters = tuple(sorted(set(plain)))
    index = torch.zeros(128, dtype=torch.uint8)
    for code, character in enumerate(characters):
        index[ord(character)] = code
    raw = torch.frombuffer(bytearray(plain.encode("ascii")), dtype=torch.uint8) if plain else torch.empty(0)
    return characters, index[raw.long()]


def _windows(codes: Tensor, spec: DataSpec) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Windows that do not overlap; the last tenth of the text is the test part. A label is the next character."""
    assert spec.length is not None
    count = (len(codes) - 1) // spec.length
    x = codes[: count * spec.length].reshape(count, spec.length)
    y = codes[1 : count * spec.length + 1].reshape(count, spec.length).long()
    test = count // 10
    wishes = {"training": (spec.subset, slice(count - test)), "test": (spec.test_subset, slice(count - test, count))}
    parts = []
    for name, (wanted, rows) in wishes.items():
        there = len(x[rows])
        if not 0 < (wanted or there) <= there:
            raise DataError(
                f"{spec.name} has {there} {name} windows of {spec.length} characters, {wanted or 'one or more'} are "
                "asked for: give a longer text, or shorter or fewer windows"
            )
        chosen = torch.randperm(there, generator=named_generator(0, "windows", name))[:wanted].sort().values
        parts.append((x[rows][chosen], y[rows][chosen]))
    return parts[0], parts[1]
