"""What the environment says about the processes that ``torchrun`` or ``accelerate launch`` started.

It says so also before they have joined and after they have parted. An ordinary process is the only one.
"""

from __future__ import annotations

import os


def processes() -> int:
    """How many there are.

    Example:
        >>> processes(), local_rank(), is_first(), is_first_of_machine()
        (1, 0, True, True)
    """
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which of its machine's this one is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    """Whether it decides, writes and talks to the user."""
    return processes() == 1 or int(os.environ.get("RANK", 0)) == 0


def is_first_of_machine() -> bool:
    """Whether it comes before the others of its machine."""
    return processes() == 1 or local_rank() == 0
