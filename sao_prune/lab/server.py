"""The process that workers are forked from: it imports what they need once, beside the first process.

This module imports nothing that takes time, so that the command can start the server before anything else.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

_HEAVY = ("numpy", "torch", "sao_prune.lab.executors")


def start_server() -> Any:
    """Start the server unless it runs; returns the `multiprocessing` context of its workers.

    Where processes cannot be forked so, workers start on their own, and nothing happens here.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    with _uninterrupted():
        forkserver.ensure_running()
    return context


def preload() -> None:
    """Import, in the server, what workers need; if the first process ends meanwhile, so does the server."""
    parent = os.getppid()
    for name in _HEAVY:
        if os.getppid() != parent:
            os._exit(1)
        try:
            importlib.import_module(name)
        except ImportError:
            # A worker that needs it says so.
            continue
    _make_an_optimizer()


def _make_an_optimizer() -> None:
    """With its first one, torch imports its compiler."""
    from torch import nn, optim, zeros

    optim.SGD([nn.Parameter(zeros(1))], lr=1.0)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started in here are deaf to Ctrl-C, which a terminal sends to all: their driver ends them."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
