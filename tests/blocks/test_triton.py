"""The Triton backend: its kernels in the interpreter, compiled without a GPU, its benchmark, and its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sao_prune.blocks.backends import triton as backend
from sao_prune.blocks.backends.triton import launch, tiles, tuning
from sao_prune.blocks.backends.triton.tables import side_of
from sao_prune.blocks.backends.triton.tiles import Tile, Work

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not backend.available(), reason="Triton is not installed")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python in the repository."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=settings, capture_output=True, text=True)


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    cases = str(Path(__file__).with_name("triton_cases.py"))
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cases, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="the assembler comes with Triton for Linux")
def test_kernels_compile_without_a_gpu_and_spill_nothing() -> None:
    code = """
import torch
from sao_prune.blocks.backends.triton import compiled, launch, tables, tiles
def empty(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")
strided = torch.arange(1024, dtype=torch.int32).view(32, 32).t().flatten()
ins = tables.side_of(strided, 32, 1024)
outs = tables.side_of(torch.arange(1024, dtype=torch.int32), 32, 1024)
x, weight, window = empty(512, 1024), empty(32, 32, 32), launch.Window()
after = launch.Epilogue(empty(1024), "gelu", x)
forward = launch.product_arguments(launch.Source(x), weight, x, ins, outs, window, after, False)
tile = tiles.product_tiles(forward[2])[0]
for capability in (80, 90):
    found = compiled.resources("product", forward, tile, capability)
    assert found.spills == 0 and 0 < found.registers <= 255 and found.instruction != "fma", found
sums = empty(32, 32, 32, dtype=torch.float32), empty(1024, dtype=torch.float32)
back = launch.weight_arguments(launch.Source(x), launch.Source(x, x, "kept"), *sums, ins, outs, window)
found = compiled.resources("weight_gradient", back, tiles.weight_tiles(back[2])[0], 80)
assert found.spills == 0 and found.instruction == "mma", found
"""
    done = run("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_a_gpu_or_an_interpreter_nothing_suits() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert not backend.suits_linear(torch.randn(2, 4), torch.randn(2, 2, 2))


def work(**changes: object) -> Work:
    """A layer of 1024 channels with some changes."""
    given = {"rows": 512, "groups": 32, "r": 32, "c": 32, "taps": 1, "inputs": "strided", "outputs": "identity"}
    return Work(**{**given, "bytes": 2, "processors": 132, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2, 3, 31, 64, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 16, 128, 1000])
def test_there_are_tiles_for_every_shape(groups: int, size: int) -> None:
    for other in (1, 5, 64):
        for kind in ("identity", "strided", "index"):
            for rows in (1, 17, 100_000):
                shape = work(groups=groups, r=size, c=other, inputs=kind, rows=rows)
                for found in (tiles.product_tiles(shape), tiles.weight_tiles(shape)):
                    assert found
                    for tile in found:
                        assert all(n == tiles.power(n) for n in (tile.BM, tile.BR, tile.BC, tile.Q, tile.P))
                        assert tile.P * tile.BC >= 16
                        assert tile.packed <= tiles.power(groups)


def test_small_blocks_are_packed_several_to_a_product() -> None:
    small = tiles.product_tiles(work(r=2, c=2, inputs="identity"))
    assert any(tile.P >= 4 for tile in small)
    assert all(tile.P == 1 for tile in tiles.product_tiles(work(r=64, c=64)))


def test_parts_cover_the_rows() -> None:
    for rows in (1, 63, 4096, 10**6):
        shape = work(rows=rows)
        for tile in tiles.weight_tiles(shape):
            assert 1 <= tiles.parts(tile, shape) <= 64


def test_choices_are_kept_and_a_broken_cache_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(tuning, "_READ", set())
    path = tmp_path / "sao_prune" / "device.json"
    first, second = Tile(16, 32, 16, 8, 1, 1, 4, 3), Tile(32, 32, 16, 8, 1, 1, 8, 3)
    tuning._CHOSEN[("device", "a")] = first
    tuning._write(path, "device")
    assert json.loads(path.read_text()) == {"a": [16, 32, 16, 8, 1, 1, 4, 3]}
    assert [file.name for file in path.parent.iterdir()] == ["device.json"]
    # Another process finds one more; what it wrote is not lost.
    path.write_text(json.dumps({"b": [32, 32, 16, 8, 1, 1, 8, 3]}))
    tuning._write(path, "device")
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert tuning._CHOSEN[("device", "b")] == second
    for broken in ("", "[]", '{"a": [1]}', '{"a": "x"}', "\x00"):
        tuning._CHOSEN.clear()
        tuning._READ.clear()
        path.write_text(broken)
        tuning._read(path, "device")
        assert not tuning._CHOSEN
    monkeypatch.setattr(tuning.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
    tuning._write(path, "device")  # says nothing


def test_tables_are_recognised() -> None:
    natural = torch.arange(12, dtype=torch.int32)
    assert side_of(natural, 3, 12).kind == "identity"
    assert side_of(natural.view(4, 3).t().contiguous().flatten(), 3, 12).kind == "strided"
    assert side_of(natural.flip(0), 3, 12).kind == "index"
    assert side_of(natural, 3, 12).missing is None
    assert side_of(natural, 3, 14).missing.tolist() == [12, 13]  # type: ignore[union-attr]


def test_the_window_of_a_convolution() -> None:
    for size, stride, padding, dilation in [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 0, 1), (2, 3, 2, 2)]:
        window = launch.Window((size,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
        image = torch.zeros(1, 1, 9, 11)
        want = torch.nn.functional.conv2d(image, torch.zeros(1, 1, size, size), None, stride, padding, dilation)
        assert window.result(9, 11) == tuple(want.shape[2:])
