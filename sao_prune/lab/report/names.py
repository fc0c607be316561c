"""What the short names of methods stand for."""

from __future__ import annotations

from collections.abc import Iterable

import sao_prune

from ..methods import METHODS, MethodSpec
from ..summary import Row

_FULL = {
    "dense": "Dense network, nothing pruned",
    "sao": "Sparsity-aware orthogonal initialisation",
    "sao-iso": "Sparsity-aware orthogonal initialisation with isometric residual blocks",
    "rg-s": "Ramanujan-graph mask on the initial weights",
    "rg-t": "Ramanujan-graph mask on trained weights",
    "rg-n": "Ramanujan-graph mask with normal values",
    "rg-u": "Ramanujan-graph mask with uniform values",
    "gmp-s": "Global magnitude pruning of the initial weights",
    "gmp-t": "Global magnitude pruning of trained weights",
    "gmp-gradual": "Global magnitude pruning of trained weights, more of them over training",
    "lmp-s": "Local magnitude pruning of the initial weights",
    "lmp-t": "Local magnitude pruning of trained weights",
    "lmp-gradual": "Local magnitude pruning of trained weights, more of them over training",
    "lrp-s": "Local random pruning of the initial weights",
    "lrp-t": "Local random pruning of trained weights",
    "eoi": "Exact orthogonal initialisation by Givens rotations",
    "snip": "Single-shot network pruning by connection sensitivity",
    "grasp": "Gradient signal preservation",
    "synflow": "Iterative synaptic flow pruning",
    "project": "Projection of a trained model onto blocks, sets chosen by energy",
    "project-random": "Projection of a trained model onto blocks, random sets",
    "two-four-t": "2:4 magnitude pruning of trained weights: two of every four in a row stay",
    "two-four-permuted-t": "2:4 magnitude pruning of trained weights, its columns permuted to keep more of them",
    "rewire": "Inputs of a layer change places between its blocks during training, chosen by a score",
    "rewire-random": "Inputs of a layer change places between its blocks during training, at random",
    "set": "Sparse evolutionary training: weights move",
    "set-kernel": "Sparse evolutionary training: whole kernels move",
    "rigl": "Rigging the lottery: weights move to where gradients are large",
    "rigl-kernel": "Rigging the lottery: whole kernels move to where gradients are large",
    "rigl-block": "Rigging the lottery: whole tiles move to where gradients are large",
    "structured-s": "Structured pruning: whole channels of the initial network go",
    "structured-t": "Structured pruning: whole channels of a trained network go",
}


def full_name(method: MethodSpec) -> str:
    """What a method's short name stands for; one without an entry has its class's first sentence and preset options.

    Example:
        >>> full_name(MethodSpec("gmp-s"))
        'Global magnitude pruning of the initial weights'
        >>> full_name(MethodSpec("sao", {"gain": 1.1}))
        'Sparsity-aware orthogonal initialisation (gain 1.1)'
    """
    known, options = _FULL.get(method.name), dict(method.options)
    if known is None:
        known, options = _sentence(method.name), {**METHODS[method.name].preset, **options}
    return f"{known} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else known


def full_names(rows: Iterable[Row]) -> dict[str, str]:
    """The full name of every method of a table, by the name that the table shows."""
    return {row.configuration.method.title: full_name(row.configuration.method) for row in rows}


def _sentence(name: str) -> str:
    method = METHODS[name]
    doc = getattr(sao_prune, method.pruner).__doc__ if method.pruner else None
    return (doc or method.label).strip().partition("\n")[0].rstrip(".")
