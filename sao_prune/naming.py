"""What a mistyped name may mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[object], count: int = 1) -> str:
    """A hint at what a mistyped name may mean; empty if nothing is near.

    Args:
        name: as it was given.
        known: the names that there are.
        count: of how many to tell at most.

    Returns:
        Text to stand behind the name in a message.

    Example:
        >>> nearest("interleave", ["ramanujan", "interleaved"])
        " (did you mean 'interleaved'?)"
    """
    near = get_close_matches(str(name), [str(each) for each in known], n=count)
    return f" (did you mean {', '.join(map(repr, near))}?)" if near else ""


def dotted(path: str, name: str) -> str:
    """A name below a path, as torch joins names of modules and parameters.

    Args:
        path: of the module; empty for the model itself.
        name: in the module; empty for the module itself.

    Returns:
        The path of what has the name.

    Example:
        >>> dotted("blocks.0", "weight"), dotted("", "weight"), dotted("blocks.0", "")
        ('blocks.0.weight', 'weight', 'blocks.0')
    """
    return ".".join(filter(None, (path, name)))
