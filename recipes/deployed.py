"""Exported files and what they are worth: accuracy, size and time, in ONNX Runtime and in torch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.lab.data import Dataset
from sao_prune.lab.processors import affinities, apart, staying


@dataclass
class Row:
    """One file, and what it is worth.

    Attributes:
        one_shot: accuracy right after conversion.
        accuracy: of the file, on the test images; ``agreement`` with the dense file's top-1.
        error: squared error of its logits relative to the variance of the dense file's.
        multiply_adds: as a share of the dense model's.
        runtime: milliseconds a call in ONNX Runtime, by batch size; ``eager`` in torch, models without blocks in the
            faster one of the two memory formats.
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
    # Threads that wait for the next call of one session would take the cores from all others.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    processors = apart(threads)
    if processors:
        settings.add_session_config_entry("session.intra_op_thread_affinities", affinities(processors))
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
    last = {name: channels_last(model) for name, model in models.items() if not name.startswith("project")}
    for size in batches if repeats else ():
        batch = x[:1].repeat(size, 1, 1, 1).contiguous()
        runs = {name: partial(run[name], batch.numpy()) for name in models}
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, model in models.items():
            calls[name, "eager"] = partial(logits, model, batch)
            if name in last:
                calls[name, "last"] = partial(logits, last[name], batch.contiguous(memory_format=torch.channels_last))
        # One after the other, as each has threads of its own.
        with staying(processors):
            runtime = timed(runs, repeats)
        with threads_of_torch(threads):
            found = timed(calls, repeats)
        for name, row in rows.items():
            row.runtime[size] = runtime[name]
            row.eager[size] = min(found[name, "eager"], found.get((name, "last"), inf))


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """So many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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
