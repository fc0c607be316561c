"""Results are not put off in a process that has compiled anything: no test is to see what another has compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    if "torch._dynamo.eval_frame" in sys.modules:
        torch.compiler.reset()
