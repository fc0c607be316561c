"""One thread a test process: several of them share the cores, and waiting threads cost more than they bring."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402 - after the environment that it reads
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# A test tells what is right, not how busy the machine is.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
