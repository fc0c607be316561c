"""Balanced assignment: every node to one of a few sets of given sizes, for the highest sum of scores."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_UP_TO = 2000


def balanced_assignment(scores: Tensor, sizes: Tensor, start: Tensor | None = None) -> Tensor:
    """The set of every node, with ``sizes[k]`` nodes in set ``k`` and the highest sum of scores.

    Up to 2,000 nodes the sum is the highest there is (``scipy.optimize.linear_sum_assignment`` on one column for
    every place in a set). Above that nodes are swapped between pairs of sets until no swap gains, in memory and
    time in proportion to nodes times sets instead of the cube of the nodes; what is left to gain by longer exchanges is
    below a thousandth.

    Args:
        scores: ``(nodes, sets)``, what a node adds to the sum in a set; finite.
        sizes: ``(sets,)``, summing to the number of nodes.
        start: labels with these sizes to improve on; only for the exchange, and optional there.

    Returns:
        Labels, shape ``(nodes,)``.

    Raises:
        ValueError: if the sizes do not sum to the number of nodes.

    Example:
        >>> balanced_assignment(torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]), torch.tensor([2, 1])).tolist()
        [0, 0, 1]
    """
    if scores.dim() != 2 or sizes.shape != scores.shape[1:] or int(sizes.sum()) != scores.shape[0]:
        raise ValueError(
            f"sizes must be one a set and sum to the number of nodes: got scores {tuple(scores.shape)} and sizes "
            f"{sizes.tolist()[:8]}"
        )
    if scores.shape[1] == 1:
        return torch.zeros(scores.shape[0], dtype=torch.long, device="cpu")
    if scores.shape[0] <= _EXACT_UP_TO:
        # Imported here: scipy.optimize takes as long to import as the rest of the package.
        from scipy.optimize import linear_sum_assignment

        places = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
        _, chosen = linear_sum_assignment(scores[:, places].numpy(), maximize=True)
        return places[torch.from_numpy(chosen)]
    return exchange(scores, sizes, greedy(scores, sizes) if start is None else start)


def greedy(scores: Tensor, sizes: Tensor) -> Tensor:
    """Labels with the given sizes: in turn the nodes with most to lose take the best set that has a place left."""
    labels = torch.full((scores.shape[0],), -1, dtype=torch.long, device="cpu")
    left = sizes.clone()
    open_nodes = torch.arange(scores.shape[0], device="cpu")
    while len(open_nodes):
        among = scores[open_nodes].masked_fill(left == 0, -torch.inf)
        top = among.topk(min(2, int((left > 0).sum())), dim=1)
        wish = top.indices[:, 0]
        regret = top.values[:, 0] - top.values[:, -1]
        order = torch.argsort(regret, descending=True, stable=True)
        ranked = wish[order]
        # The rank of a node among those that wish for the same set.
        by_set = torch.argsort(ranked, stable=True)
        counts = torch.bincount(ranked, minlength=len(sizes))
        rank = torch.empty_like(order)
        rank[by_set] = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts)[ranked[by_set]]
        served = rank < left[ranked]
        nodes = open_nodes[order]
        labels[nodes[served]] = ranked[served]
        left = left - torch.minimum(counts, left)
        open_nodes = nodes[~served]
    return labels


def exchange(scores: Tensor, sizes: Tensor, labels: Tensor) -> Tensor:
    """Improve labels by swaps between two sets, as many as gain at once, until no pair of sets gains."""
    labels, sets = labels.clone(), len(sizes)
    tolerance = 1e-6 * float(scores.abs().max())
    members = [torch.nonzero(labels == k).flatten() for k in range(sets)]
    best = torch.stack([_gains(scores, members[k], k) for k in range(sets)])
    for _ in range(8 * sets * sets):
        pairs = best + best.T
        at = int(pairs.argmax())
        if not float(pairs.flatten()[at]) > tolerance:
            break
        a, b = at // sets, at % sets
        leaving = [scores[members[k], other] - scores[members[k], k] for k, other in ((a, b), (b, a))]
        ranked = [gain.sort(descending=True) for gain in leaving]
        count = min(len(members[a]), len(members[b]))
        swaps = int((ranked[0].values[:count] + ranked[1].values[:count] > 0).sum())
        out = [members[k][r.indices[:swaps]] for k, r in zip((a, b), ranked)]
        stay = [members[k][r.indices[swaps:]] for k, r in zip((a, b), ranked)]
        members[a], members[b] = torch.cat([stay[0], out[1]]), torch.cat([stay[1], out[0]])
        for k in (a, b):
            best[k] = _gains(scores, members[k], k)
    for k in range(sets):
        labels[members[k]] = k
    return labels


def _gains(scores: Tensor, members: Tensor, k: int) -> Tensor:
    """The most that one node of set ``k`` gains in every other set."""
    gains = (scores[members] - scores[members, k, None]).amax(0)
    gains[k] = -torch.inf
    return gains
