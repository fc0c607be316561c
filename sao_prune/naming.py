"""What a mistyped name may mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[object]) -> str:
    """A hint at what a mistyped name may mean; empty if nothing is near.

    Args:
        name: as it was given.
        known: the names that there are.

    Returns:
        Text to stand behind the name in a message.

    Example:
        >>> nearest("interleave", ["ramanujan", "interleaved"])
        " (did you mean 'interleaved'?)"
    """
    near = get_close_matches(str(name), [str(each) for each in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
