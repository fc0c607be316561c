"""Two processes that talk to each other, as ranks of a distributed run do."""

import sys
from collections.abc import Callable

import torch.multiprocessing as mp

from sao_prune.lab.server import start_server


def in_two_processes(rank: Callable[..., None], *arguments: object) -> None:
    """Call a function as rank 0 and rank 1, forked from one process that has imported torch once for all tests."""
    start_server()
    mp.start_processes(rank, arguments, nprocs=2, start_method="spawn" if sys.platform == "win32" else "forkserver")
