"""The Triton backend: its kernels in the interpreter, compiled without a GPU, its benchmark, and its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sao_prune.blocks.backends import triton as backend
from sao_prune.blocks.backends.triton import launch, tiles, tuning
from sao_prune.blocks.backends.triton.compiled import resources
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
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
def test_kernels_compile_without_a_gpu_and_spill_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    natural = torch.arange(1024, dtype=torch.int32)
    strided = natural.view(32, 32).t().flatten()
    ins, outs = side_of(strided, 32, 1024), side_of(natural, 32, 1024)
    x, weight, window = empty(512, 1024), empty(32, 32, 32), launch.Window()
    after = launch.Epilogue(empty(1024), "gelu", x)
    forward = launch.product_arguments(launch.Source(x), weight, x, ins, outs, window, after, False)
    sums = empty(32, 32, 32, dtype=torch.float32), empty(1024, dtype=torch.float32)
    grad = launch.Source(x, x, "kept")
    backward = launch.weight_arguments(launch.Source(x), grad, *sums, ins, outs, window)
    for kernel, arguments, tile, capability in (
        ("product", forward, tiles.product_tiles(forward[2])[0], 90),
        ("weight_gradient", backward, tiles.weight_tiles(backward[2])[0], 80),
    ):
        found = resources(kernel, arguments, tile, capability)
        assert found.spills == 0
        assert 0 < found.registers <= 255
        assert found.instruction != "fma"


@needs_triton
@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_without_one() -> None:
    done = run("benchmarks/gpu.py", "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test_resnet" in done.stdout
    assert "failed" not in done.stdout
    if not torch.cuda.is_available():
        done = run("benchmarks/gpu.py")
        assert done.returncode == 2
        assert len(done.stdout.splitlines()) == 1


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_a_gpu() -> None:
    code = """
import sys
sys.path.insert(0, "benchmarks")
import gpu_layers
from gpu_timing import Device
for layer in (*gpu_layers.LAYERS, *gpu_layers.SMOKE):
    for kind, topology in gpu_layers.topologies(layer).items():
        distance = gpu_layers.agreement(layer, topology, Device("cuda", False))
        assert distance < 2e-2, (layer, kind, distance)
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


@pytest.mark.parametrize("groups", [1, 3, 31, 1000])
@pytest.mark.parametrize("size", [1, 3, 12, 16, 1000])
def test_there_are_tiles_for_every_shape(groups: int, size: int) -> None:
    for other in (1, 64):
        for kind in ("strided", "index"):
            for rows in (1, 17, 100_000):
                shape = work(groups=groups, r=size, c=other, inputs=kind, rows=rows, plain=rows != 17)
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
    assert json.loads(path.read_text()) == {"a": [16, 32, 16, 8, 1, 1, 4, 3, 0]}
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
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
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


def test_the_fastest_tile_is_taken_and_one_that_spills_gets_all_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    found = tiles.product_tiles(work())
    seconds = {tile: 1.0 + i for i, tile in enumerate(reversed(found))}
    tried: list[Tile] = []

    def bench(way: Callable[[], int], **options: object) -> float:
        way()
        return seconds[replace(tried[-1], registers=0)]

    def spilling(tile: Tile) -> int:
        tried.append(tile)
        return 0 if tile.registers else 8

    monkeypatch.setattr(testing, "do_bench", bench)
    assert tuning._fastest(found, spilling) == found[-1].roomy
    assert tuning._fastest(found, lambda tile: tried.append(tile) or 0) == found[-1]  # type: ignore[func-returns-value]
