"""Names in a state dict: which of several is the model's, under what prefix, and what tied weights leave out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set

from torch import Tensor, nn

from .state_file import CheckpointError

_COMPUTED = re.compile(r"(^|\.)parametrizations\.([^.]+)\..+$")
_SUFFIXES = ("", "_orig", "_mask")
_FEW = 4


def choose(
    states: Sequence[dict[str, Tensor]], own: Iterable[str], prefix: str | None = None, strict: bool = True
) -> dict[str, Tensor]:
    """The state dict among several that is a model's, under the model's own names.

    Args:
        states: the likeliest first; it is taken if no other has more of the model's names.
        own: the names in the model's state dict.
        prefix: take what is under it, and only that; ``None`` finds the one that all names share.
        strict: refuse names outside the prefix.

    Raises:
        CheckpointError: if nothing is under a given prefix, or some names are outside the one that was found.

    Example:
        >>> import torch
        >>> w = torch.ones(1)
        >>> list(choose([{"net.0.weight": w, "net.0.bias": w}], ["0.weight", "0.bias"]))
        ['0.weight', '0.bias']
    """
    ours = dict.fromkeys(_plain(key) for key in own).keys()
    if prefix is not None:
        dotted = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
        states = [{k.removeprefix(dotted): v for k, v in s.items() if k.startswith(dotted)} for s in states]
        state = max(states, key=lambda s: len(ours & {_plain(k) for k in s}))
        if not state:
            raise CheckpointError(f"the checkpoint has no entry under the prefix {dotted!r}")
        return state
    found = [(state, *_prefixes(state, ours)) for state in states]
    state, stripped, added, _ = max(found, key=lambda each: each[3])
    outside = [key for key in state if not key.startswith(stripped)]
    if outside and strict:
        named = ", ".join(outside[:_FEW]) + (", .." if len(outside) > _FEW else "")
        raise CheckpointError(
            f"the model's entries are under {stripped!r} in the checkpoint, others are not ({named}): load with "
            f"prefix={stripped!r} to leave those out"
        )
    return {added + key.removeprefix(stripped): value for key, value in state.items() if key.startswith(stripped)}


def _prefixes(state: Mapping[str, Tensor], ours: Set[str]) -> tuple[str, str, int]:
    """The prefix to take from a state's names, the one to put before them, and how many are the model's then."""
    theirs = dict.fromkeys(_plain(key) for key in state)
    matches = {("", ""): len(theirs.keys() & ours)}
    for longer, shorter, strips in ((theirs, ours, True), (ours, theirs, False)):
        counts: Counter[str] = Counter()
        for key in longer:
            for start in [m.end() for m in re.finditer(r"\.", key)]:
                if key[start:] in shorter:
                    counts[key[:start]] += 1
        for before, count in counts.items():
            matches[(before, "") if strips else ("", before)] = count
    stripped, added = max(matches, key=lambda pair: (matches[pair], pair == ("", "")))
    return stripped, added, matches[stripped, added]


def _plain(key: str) -> str:
    """The name of the dense weight that an entry of a masked, compact or held layer belongs to."""
    key = _COMPUTED.sub(r"\1\2", key)
    path, dot, last = key.rpartition(".")
    last = last.removesuffix("_orig").removesuffix("_mask")
    return path + dot + ("weight" if last in ("blocks", "row_set", "col_set") else last)


def complete_tied(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill in, in place, the entries of tied weights, and of modules under several names, that a checkpoint holds once,
    under one of their names."""
    _complete_modules(model, state)
    owners: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            owners.setdefault(id(value), []).append(key.removesuffix("_orig"))
    for names in owners.values():
        lacking = [name for name in names if not any(f"{name}{suffix}" in state for suffix in _SUFFIXES)]
        source = next((name for name in names if name not in lacking), None)
        for name in lacking if source is not None else ():
            state.update({f"{name}{s}": state[f"{source}{s}"] for s in _SUFFIXES if f"{source}{s}" in state})


def _complete_modules(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The same of modules whose other names the checkpoint has not, whatever form they have in it."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    same = {path: names for names in paths.values() if len(names) > 1 for path in names}
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        for start in (m.start() for m in re.finditer(r"\.", key)):
            if key[:start] in same:
                entries.setdefault(key[:start], {})[key[start:]] = value
    for path, found in entries.items():
        for other in same[path]:
            if other not in entries:
                state.update({other + end: value for end, value in found.items()})
