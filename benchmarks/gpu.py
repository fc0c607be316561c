"""Measure block layers and compact models on a GPU against dense ones, in one run, and write GPU.md.

python benchmarks/gpu.py                         # everything; with torch.compile that takes about an hour
python benchmarks/gpu.py --only Linear,vit_base  # what contains one of these; nothing is written
python benchmarks/gpu.py --smoke                 # tiny shapes, kernels interpreted on the CPU: that the script runs
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import gpu_layers
import gpu_models
import torch
from gpu_timing import Device, Roof, Time, graphed, measure_roof, race

RESULTS = Path(__file__).with_name("GPU.md")
HEAD = [
    "| work | pass | way | ms | launching, ms | against dense | of the roofline |",
    "|---|---|---|---:|---:|---:|---:|",
]
Target = tuple[str, str, float, bool]


def layers(chosen: list[str], roof: Roof, device: Device) -> Iterator[str | Target]:
    """Lines of the table and what became of targets: what, measured, asked for, and whether more is better."""
    for layer in gpu_layers.SMOKE if device.smoke else gpu_layers.LAYERS:
        if not matches(layer.name, chosen):
            continue
        for kind, topology in gpu_layers.topologies(layer).items():
            name = f"{layer.name}, {layer.groups} blocks, {kind}"
            distance = gpu_layers.agreement(layer, topology, device)
            if not distance < 2e-2:
                raise SystemExit(f"{name}: results or gradients are {distance:.2g} from the right ones")
            small = layer.batch <= 256
            for what, ways in gpu_layers.ways(layer, topology, device).items():
                if small:
                    ways = {**ways, **{f"{way}, CUDA graph": graphed(run, device) for way, run in ways.items()}}
                times, failed = race(ways, device, 50)
                limit = gpu_layers.limits(layer, roof, device)[what]
                yield from lines(name, what, times, failed, "dense", limit)
                best = least(times, "ours")
                dense = least(times, "dense")
                if kind == "interleaved" and "Linear" in name and best and dense:
                    yield f"{name}, {what}: times as fast as dense", f"{dense / best:.2f}", 4.0, True
                    yield f"{name}, {what}: times the roofline's time", f"{best / limit:.2f}", 1.6, False


def models(chosen: list[str], device: Device) -> Iterator[str | Target]:
    """The same of whole models."""
    for model in gpu_models.SMOKE if device.smoke else gpu_models.MODELS:
        if not matches(model.name, chosen):
            continue
        for what, batch, ways in gpu_models.works(model, device):
            name = f"{model.name}, batch {batch}"
            times, failed = race(ways, device, 20)
            yield from lines(name, what, times, failed, "dense", None)
            yield from model_targets(model, name, what, times)


def model_targets(model: gpu_models.Model, name: str, what: str, times: dict[str, Time]) -> Iterator[Target]:
    """What was asked of a model."""
    dense, ours = least(times, "dense"), least(times, "compact")
    if not dense or not ours:
        return
    if model.target and what == "training step" and "dense, compiled" in times:
        ratio = times["dense, compiled"].device / ours
        yield f"{name}, {what}: times as fast as dense, compiled", f"{ratio:.2f}", model.target, True
    if model.never_below:
        yield f"{name}, {what}: times as fast as the fastest dense", f"{dense / ours:.2f}", 1.0, True


def least(times: dict[str, Time], way: str) -> float | None:
    """The least time of the forms of a way."""
    return min((time.device for name, time in times.items() if name.split(",")[0] == way), default=None)


def lines(
    name: str, what: str, times: dict[str, Time], failed: dict[str, str], base: str, limit: float | None
) -> Iterator[str]:
    """Lines of the table."""
    for way, time in times.items():
        ratio = f"{times[base].device / time.device:.2f}x" if base in times else ""
        roof = "" if limit is None else f"{time.device / limit:.2f}x"
        yield f"| {name} | {what} | {way} | {time.device:.4g} | {time.host:.3g} | {ratio} | {roof} |"
    if limit is not None:
        yield f"| {name} | {what} | *roofline* | {limit:.4g} | | | |"
    for way, reason in failed.items():
        yield f"| {name} | {what} | {way} | failed: {reason} | | | |"


def matches(name: str, chosen: list[str]) -> bool:
    """Whether a name contains one of the parts; anything does if there are none."""
    return not chosen or any(part in name for part in chosen)


def document(table: list[str], targets: list[Target], roof: Roof, device: Device) -> str:
    """The whole page."""
    where = torch.cuda.get_device_name() if device.name == "cuda" else f"{platform.machine()}, interpreted: no numbers"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "timm", "sao-prune"))
    met = [
        f"| {what} | {'>=' if more else '<='} {asked:g} | {measured} | "
        f"{'met' if (float(measured) >= asked) == more or float(measured) == asked else '**not met**'} |"
        for what, measured, asked, more in targets
    ]
    return "\n".join(
        [
            "# Measured on a GPU",
            "",
            f"`python {' '.join(sys.argv)}`, {date.today()}, {where}, {versions}, CUDA {torch.version.cuda}.",
            "",
            f"Measured on this device: {roof.bandwidth / 1e9:.3g} TB/s copying, {roof.peak / 1e9:.4g} TFLOP/s in a",
            f"product of matrices, {str(device.dtype).removeprefix('torch.')}. The roofline of a layer is the larger",
            "of the two times that these give for its bytes, each read or written once, and its products. The ways of",
            "a row run in turn, each after the second-level cache was overwritten; times are medians of CUDA events. A",
            "layer's kernels are queued before they start, so its time is the device's; *launching* is what the host",
            "needs to queue them, and without a CUDA graph the larger of the two counts. A model's time has both.",
            "",
            "## Targets",
            "",
            "| what | asked | measured | |",
            "|---|---|---|---|",
            *met,
            "",
            "## All",
            "",
            *HEAD,
            *table,
            "",
        ]
    )


def main() -> None:
    """Measure, print, and after a full run write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of the names of layers and models")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in the interpreter; nothing is written")
    parser.add_argument("--out", type=Path, help="where to write the page (default: GPU.md after a full run)")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False, so there is nothing to measure (try --smoke)")
        sys.exit(2)
    device = Device("cpu" if options.smoke else "cuda", options.smoke)
    chosen = [part for part in options.only.split(",") if part]
    torch.manual_seed(0)
    roof = measure_roof(device)
    table: list[str] = []
    targets: list[Target] = []
    print(*HEAD, sep="\n")
    for found in (layers(chosen, roof, device), models(chosen, device)):
        for one in found:
            if isinstance(one, str):
                table.append(one)
                print(one, flush=True)
            else:
                targets.append(one)
    page = document(table, targets, roof, device)
    print(page[: page.index("## All")])
    out = options.out or (None if chosen or options.smoke else RESULTS)
    if out is not None:
        out.write_text(page)


if __name__ == "__main__":
    main()
