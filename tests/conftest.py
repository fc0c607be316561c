"""One thread a test process: several of them share the cores, and waiting threads cost more than they bring."""

import gc
import os
from collections.abc import Iterator

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402 - after the environment that it reads
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# A test tells what is right, not how busy the machine is.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _freeze() -> None:
    """Modules live to the end: the collector, which verbs ask for optimizers, need not go through them again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    _freeze()


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> Iterator[None]:
    """What a module's tests have imported, too."""
    yield
    _freeze()
