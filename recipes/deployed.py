"""Exported files and what they are worth: accuracy, size and time, in ONNX Runtime and in torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.lab.data import Dataset


@dataclass
class Row:
    """One file, and what it is worth.

    Attributes:
        one_shot: accuracy right after conversion.
        accuracy: of the file, on the test images; ``agreement`` with the dense file's top-1.
        error: squared error of its logits relative to the variance of the dense file's.
        multiply_adds: as a share of the dense model's.
        runtime: milliseconds a call in ONNX Runtime, by batch size; ``eager`` in torch.
    """

    name: str
    one_shot: float
    one_shot_error: float
    multiply_adds: float
    parameters: int
    accuracy: float = 0.0
    agreement: float = 0.0
    error: float = 0.0
    megabytes: float = 0.0
    runtime: dict[int, float] = field(default_factory=dict)
    eager: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.eval()(part) for part in x.split(64)])


def output_error(found: Tensor, wanted: Tensor) -> float:
    """Squared error relative to the variance of what is wanted."""
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def measure(
    folder: Path,
    models: Mapping[str, nn.Module],
    rows: Mapping[str, Row],
    data: Dataset,
    batches: Sequence[int],
    repeats: int,
    threads: int,
) -> None:
    """Export every model into a folder and fill in its row from the file.

    Args:
        folder: where the files go.
        models: by name; one of them is ``dense``.
        rows: of the same names.
        data: whose test images are shown to the files.
        batches: sizes that are timed.
        repeats: timed calls of each; 0 for no times.
        threads: of ONNX Runtime and torch.
    """
    x = data.standardise(data.test_x)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    sessions = {}
    for name, model in models.items():
        path = folder / f"{name}.onnx"
        print(sao_prune.export_onnx(model, x[:2], path), flush=True)
        sessions[name] = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        rows[name].megabytes = path.stat().st_size / 1e6
    run = {name: runner(session) for name, session in sessions.items()}
    outputs = {
        name: torch.cat([torch.from_numpy(call(part.numpy())) for part in x.split(64)]) for name, call in run.items()
    }
    for name, found in outputs.items():
        rows[name].accuracy = float((found.argmax(1) == data.test_y).float().mean())
        rows[name].agreement = float((found.argmax(1) == outputs["dense"].argmax(1)).float().mean())
        rows[name].error = output_error(found, outputs["dense"])
    torch.set_num_threads(threads)
    for size in batches if repeats else ():
        batch = x[:1].repeat(size, 1, 1, 1).contiguous()
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, model in models.items():
            calls[name, "runtime"] = partial(run[name], batch.numpy())
            calls[name, "eager"] = partial(logits, model, batch)
        for (name, form), milliseconds in timed(calls, repeats).items():
            getattr(rows[name], form)[size] = milliseconds


def runner(session: Any) -> Callable[[np.ndarray], np.ndarray]:
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def timed(calls: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Milliseconds of each call: medians, taken in turn, so that what disturbs one disturbs all."""
    found: dict[Any, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 3):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 3:
                found[key].append(1e3 * (time.perf_counter() - start))
    return {key: median(values) for key, values in found.items()}


def table(rows: list[Row]) -> str:
    """Markdown, and which thinned file to compare each converted one with at equal accuracy."""
    sizes = list(rows[0].runtime)
    times = [f"{form}, batch {size}, ms" for size in sizes for form in ("ONNX Runtime", "torch")]
    head = ["file", "one-shot", "accuracy", "agreement", "output error (one-shot)", "multiply-adds", "MB", *times]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        cells = [row.name, f"{row.one_shot:.2%}", f"{row.accuracy:.2%}", f"{row.agreement:.2%}"]
        cells += [f"{row.error:.3f} ({row.one_shot_error:.3f})", f"{row.multiply_adds:.1%}", f"{row.megabytes:.2f}"]
        cells += [f"{t[size]:.2f}" for size in sizes for t in (row.runtime, row.eager)]
        lines.append(cells)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    thinned = [row for row in rows if row.name.startswith("structured")]
    for row in [row for row in rows if row.name.startswith("project") and thinned]:
        equal = min((r for r in thinned if r.accuracy >= row.accuracy), key=lambda r: r.multiply_adds, default=None)
        found = "none" if equal is None else f"{equal.name} ({equal.multiply_adds:.1%} of the multiply-adds)"
        text += f"\nthe smallest thinned file that is no less accurate than {row.name}: {found}"
    return text
