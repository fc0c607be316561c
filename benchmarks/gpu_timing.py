"""Time ways of doing one thing on a GPU in turn, each from an empty cache, and what the device itself can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from time import perf_counter

import torch

Way = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """Where to measure, and whether only to see that the script runs."""

    name: str
    smoke: bool

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return torch.float32 if self.smoke else torch.bfloat16

    def wait(self) -> None:
        """Until nothing is left to do."""
        if self.name == "cuda":
            torch.cuda.synchronize()


@lru_cache(maxsize=1)
def _trash() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(max(size, 1 << 28) // 4, dtype=torch.int32, device="cuda")


@dataclass(frozen=True)
class Time:
    """Milliseconds: of the device, and until the host had launched all of it."""

    device: float
    host: float


def once(way: Way, device: Device) -> Time:
    """One run, by the device's clock, after its second-level cache was overwritten."""
    if device.name != "cuda":
        start = perf_counter()
        way()
        spent = 1e3 * (perf_counter() - start)
        return Time(spent, spent)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _trash().zero_()
    # About two milliseconds: the kernels of a layer are queued before the first of them can start, so that its time
    # is the device's alone. What a longer queue waits for the host is part of its time.
    torch.cuda._sleep(4_000_000)
    before.record()
    start = perf_counter()
    way()
    host = 1e3 * (perf_counter() - start)
    after.record()
    after.synchronize()
    return Time(float(before.elapsed_time(after)), host)


def race(ways: Mapping[str, Way], device: Device, repeats: int) -> tuple[dict[str, Time], dict[str, str]]:
    """Median times of each way, all run in turn; and of those that failed, why."""
    failed: dict[str, str] = {}
    for name, way in ways.items():
        try:
            for _ in range(1 if device.smoke else 5):
                way()
            device.wait()
        except Exception as error:  # one way that fails must not cost the others their numbers
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    times: dict[str, list[Time]] = {name: [] for name in ways if name not in failed}
    for _ in range(1 if device.smoke else repeats):
        for name, found in times.items():
            found.append(once(ways[name], device))
    return {
        name: Time(median(t.device for t in found), median(t.host for t in found)) for name, found in times.items()
    }, failed


def graphed(way: Way, device: Device) -> Way:
    """The way as one CUDA graph; as it is where there are none."""
    if device.name != "cuda":
        return way
    captured: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    way()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                way()
            captured.append(graph)
        captured[0].replay()

    return replay


@dataclass(frozen=True)
class Roof:
    """What the device does at most: bytes and floating-point operations a millisecond, both measured."""

    bandwidth: float
    peak: float

    def time(self, moved: float, operations: float) -> float:
        """The least milliseconds for so many bytes and operations."""
        return max(moved / self.bandwidth, operations / self.peak)


def measure_roof(device: Device) -> Roof:
    """A large copy, reading and writing; a large product of matrices."""
    count, side = (1 << 12, 64) if device.smoke else (1 << 28, 8192)
    source = torch.ones(count, device=device.name)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device.name, dtype=device.dtype) for _ in range(2))
    ways: dict[str, Way] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times, failed = race(ways, device, 20)
    if failed:
        raise RuntimeError(f"the device cannot be measured: {failed}")
    return Roof(2 * 4 * count / times["copy"].device, 2 * side**3 / times["product"].device)
