"""The idx reader: what it reads, and that nothing damaged passes."""

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sao_prune.lab.data.idx import read_idx
from sao_prune.lab.errors import DataError

from .conftest import idx_bytes


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), zipped=st.booleans(), seed=st.integers(0, 99))
def test_what_was_written_is_read_back(tmp_path: Path, shape: list[int], zipped: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    raw = idx_bytes(values)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert torch.equal(read_idx(path, len(shape)), values)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), zipped=st.booleans())
def test_no_truncated_file_passes(tmp_path: Path, cut: int, zipped: bool) -> None:
    raw = idx_bytes(torch.arange(60, dtype=torch.uint8).reshape(3, 4, 5))
    raw = gzip.compress(raw) if zipped else raw
    path = tmp_path / "file"
    path.write_bytes(raw[: cut % len(raw)])
    with pytest.raises(DataError, match="file"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x00\x00\x0d\x03" + bytes(12), "magic 0x00000d03"),
        (b"\x00\x00\x08\x01" + bytes(12), "magic 0x00000801"),
        (b"not an idx file at all", "magic 0x6e6f7420"),
        (b"\x00\x00\x08\x03" + (b"\x00\x00\x00\x01" * 3) + b"ab", "promises 1 values, the file holds 2"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "promises"),
    ],
)
def test_damage_is_named(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=said):
        read_idx(path, 3)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "nowhere", 1)
