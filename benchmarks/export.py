"""Exported models in ONNX Runtime and OpenVINO, dense and compact in turn: ``python benchmarks/export.py``.

Writes ``benchmarks/EXPORT.md``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from timing import Times, race
from torch import nn

import sao_prune
from sao_prune.lab.processors import affinities, apart, staying
from sao_prune.lab.work import processor_name

SPARSITY = 0.96875
THREADS = 2
# Targets against the dense model: ONNX Runtime at batch 8 and 1, OpenVINO.
TARGETS = {
    "vit_small_patch16_224": (3.0, 2.5, 2.0),
    "mixer_b16_224": (4.0, 4.0, 2.0),
    "resnet50": (2.5, 2.5, 2.0),
    "vgg16_bn": (4.0, 4.0, 2.0),
}
HEADER = """# Exported models

{sparsity:.3%} sparsity, {topologies}, {threads} threads, {machine}; onnxruntime {ort}, openvino {ov}. Median
milliseconds of {repeats} runs, all ways in turn, each in a session of its own with the runtime's default settings but
for ONNX Runtime's threads, which have a processor each and stop spinning when a run is done. Ratios
are to the dense model in the same runtime. Written by `python benchmarks/export.py`.

| model | batch | runtime | form | dense, ms | compact, ms | ratio | target | largest error | file, MB (dense) |
|---|---:|---|---|---:|---:|---:|---:|---:|---:|
"""

Run = Callable[[np.ndarray], np.ndarray]


def _network(name: str, topology: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for head in (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000):
        nn.init.normal_(head.weight, std=0.02)  # some begin at zero, which every model would agree on
    if topology is not None:
        sao_prune.apply(model, sparsity=SPARSITY, method=sao_prune.SAO(topology=topology), seed=0)
        sao_prune.compact(model, fuse=False)
    return model


def _onnxruntime(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    # Threads spin while a session runs, as they do by default, and stop when it is done: they would take the cores from
    # the way that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if apart(THREADS):
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities(apart(THREADS)))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _openvino(path: Path) -> Run:
    import openvino

    core = openvino.Core()
    # Without the precision, processors that have bfloat16 would use it.
    settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
    return lambda x: next(iter(request.infer({0: x}).values()))


def _int8(path: Path) -> Path:
    """Dynamic quantization of the products with constant weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    options = {"MatMulConstBOnly": True, "DefaultTensorType": 1}
    quantize_dynamic(
        str(path), str(target), op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8,
        per_channel=False, extra_options=options,
    )  # fmt: skip
    return target


def _runtimes(wanted: Sequence[str]) -> dict[str, Callable[[Path], Run]]:
    known = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}
    try:
        import openvino  # noqa: F401
    except ImportError:
        print("openvino is not installed: pip install openvino")
        del known["OpenVINO"]
    return {name: known[name] for name in known if not wanted or name in wanted}


def _rows(name: str, forms: Sequence[str], options: argparse.Namespace, folder: Path) -> list[str]:
    x = torch.randn(8, 3, 224, 224)
    files, for_openvino, wanted = {}, {}, {}
    for form in ("dense", *forms):
        model = _network(name, None if form == "dense" else form)
        files[form] = folder / f"{name}-{form}.onnx"
        # In the form that ONNX Runtime runs faster at the largest batch.
        print(sao_prune.export_onnx(model, x[: max(2, *options.batch)], files[form]), flush=True)
        with torch.no_grad():
            wanted[form] = model(x).numpy()
        if form == "ramanujan":
            plain = f"{form}, by channels"
            files[plain], wanted[plain] = folder / f"{name}-channels.onnx", wanted[form]
            sao_prune.export_onnx(model, x[:2], files[plain], runtime="openvino")
        elif form == "interleaved":
            for_openvino[form] = folder / f"{name}-openvino.onnx"
            sao_prune.export_onnx(model, x[:2], for_openvino[form], runtime="openvino")
    if options.int8:
        for form in list(files):
            files[f"{form}, int8"], wanted[f"{form}, int8"] = _int8(files[form]), wanted[form]
    lines = []
    for runtime, load in _runtimes(options.runtime).items():
        # Quantized operators are ONNX Runtime's own.
        own = {f: p for f, p in files.items() if "int8" not in f or runtime == "ONNX Runtime"}
        own = {**own, **for_openvino} if runtime == "OpenVINO" else own
        runs = {form: load(path) for form, path in own.items()}
        for batch in options.batch:
            given = x[:batch].numpy()
            errors = {form: _difference(run(given), wanted[form][:batch]) for form, run in runs.items()}
            # OpenVINO places its threads itself.
            with staying(apart(THREADS) if runtime == "ONNX Runtime" else []):
                times = race({form: _call(run, given) for form, run in runs.items()}, options.repeats, warm_up=1)
            target = TARGETS.get(name, (None,) * 3)[2 if runtime == "OpenVINO" else int(batch < 8)]
            for form in own:
                if form != "dense":
                    goal = target if form == "interleaved" else None
                    lines.append(_line(name, batch, runtime, form, times, goal, errors[form], own))
                    print(lines[-1], flush=True)
    return lines


def _call(run: Run, x: np.ndarray) -> Callable[[], object]:
    return lambda: run(x)


def _difference(found: np.ndarray, wanted: np.ndarray) -> str:
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    agreement = float((found.argmax(-1) == wanted.argmax(-1)).mean())
    return f"{error:.1e}" if error < 1e-3 else f"{error:.1e}, classes agree {agreement:.0%}"


def _line(
    name: str, batch: int, runtime: str, form: str, times: Times, target: Any, error: str, files: dict[str, Path]
) -> str:
    ratio = times.ratio("dense", form)
    goal = "" if target is None else f">= {target:g} {'met' if ratio >= target else 'missed'}"
    dense, compact = (1e3 * times.median(way) for way in ("dense", form))
    size, whole = (files[way].stat().st_size / 1e6 for way in (form, "dense"))
    cells = name, batch, runtime, form, f"{dense:.1f}", f"{compact:.1f}", f"{ratio:.2f}x", goal, error
    return f"| {' | '.join(map(str, cells))} | {size:.1f} ({whole:.1f}) |"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(TARGETS), help="timm models")
    parser.add_argument("--topology", nargs="+", default=["interleaved"], choices=["interleaved", "ramanujan"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--runtime", nargs="+", default=[], choices=["ONNX Runtime", "OpenVINO"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--int8", action="store_true", help="quantize the products dynamically, too")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("EXPORT.md"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    begun, lines = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.model:
            lines += _rows(name, options.topology, options, Path(folder))
    try:
        from openvino import __version__ as openvino_version
    except ImportError:
        openvino_version = "not installed"
    head = HEADER.format(
        sparsity=SPARSITY, topologies=" and ".join(options.topology), threads=THREADS, machine=processor_name(),
        ort=onnxruntime.__version__, ov=openvino_version.split("-")[0], repeats=options.repeats,
    )  # fmt: skip
    options.output.write_text(head + "\n".join(lines) + "\n")
    print(f"{options.output} written after {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
