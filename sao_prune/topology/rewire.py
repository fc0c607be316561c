"""Block topologies that move: inputs change places between sets, so set sizes and the number of edges stay.

A swap gives each of two inputs the other's set. What it gains are edges that are absent now, judged by the gradient
that they would have; what it loses are edges that are there, judged by their weights. Both are counted in units of
their own mean over the layer, so that neither the learning rate nor the scale of the loss matters. Outputs move
likewise: pass the transposed topology.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import BlockTopology


def set_energies(topology: BlockTopology, matrix: Tensor) -> Tensor:
    """For every set and every input the sum of absolute values between the set's outputs and the input.

    Args:
        topology: shape ``(m, n)``.
        matrix: weights or gradients, ``(m, n)``, or ``(m, n, *kernel)``, whose taps are summed up.

    Returns:
        Shape ``(groups, n)``.

    Example:
        >>> t = BlockTopology(torch.tensor([0, 1, 1]), torch.tensor([0, 1]))
        >>> set_energies(t, torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, -6.0]])).tolist()
        [[1.0, 2.0], [8.0, 10.0]]
    """
    units = matrix.detach().abs().flatten(2).sum(2) if matrix.dim() > 2 else matrix.detach().abs()
    members = torch.arange(topology.groups, device="cpu")[:, None] == topology.row_set
    return members.to(units) @ units


def move_scores(topology: BlockTopology, weight: Tensor, gradient: Tensor) -> Tensor:
    """What moving an input to a set is worth: the gradients it meets there less the weights it leaves behind.

    Args:
        topology: shape ``(m, n)``.
        weight: values on the topology, ``(m, n, *kernel)``.
        gradient: of the loss by the weight as if it were dense, same shape; averaged over all ranks.

    Returns:
        Shape ``(groups, n)``; minus infinity for an input's own set and for an input without one.

    Example:
        >>> t = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> gradient = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
        >>> move_scores(t, torch.eye(2), gradient).tolist()
        [[-inf, 0.5], [-0.5, -inf]]
    """
    gains, kept = set_energies(topology, gradient), set_energies(topology, weight)
    sets = topology.col_set.to(gains.device)
    joined = (sets >= 0).nonzero().flatten()
    own = torch.zeros_like(gains, dtype=torch.bool)
    own[sets[joined], joined] = True
    losses = torch.where(own, kept, 0).sum(0)
    edges = topology.row_sizes.to(gains)
    absent = torch.where(own, 0, edges[:, None]).sum()
    typical_gain = torch.where(own, 0, gains).sum() / absent.clamp(min=1)
    typical_loss = losses.sum() / max(topology.nnz, 1)
    tiny = torch.finfo(gains.dtype).tiny
    scores = gains / typical_gain.clamp(min=tiny) - losses / typical_loss.clamp(min=tiny)
    scores = torch.where(own, -torch.inf, scores)
    scores[:, sets < 0] = -torch.inf
    return scores


def choose_swaps(topology: BlockTopology, scores: Tensor, most: int) -> Tensor:
    """The best swaps that do not touch one another, best first: a swap is worth the sum of its two moves.

    Between two sets the ``k``-th best move there is paired with the ``k``-th best back, which loses nothing, so that
    no table of all pairs of inputs is needed. Ties go to lower set numbers and lower inputs: ranks with equal scores
    choose equally.

    Args:
        topology: shape ``(m, n)``.
        scores: of moves, ``(groups, n)``, from `move_scores`.
        most: how many swaps at most; only those of positive worth are taken.

    Returns:
        Pairs of inputs, shape ``(swaps, 2)``.

    Example:
        >>> t = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> scores = torch.tensor([[-9.0, -9.0, 1.0, 5.0], [2.0, 3.0, -9.0, -9.0]])
        >>> choose_swaps(t, scores, 1).tolist(), choose_swaps(t, scores, 9).tolist()
        ([[1, 3]], [[1, 3], [0, 2]])
    """
    groups, values = topology.groups, scores.detach().double().cpu()
    if most < 1 or groups < 2:
        return torch.zeros(0, 2, dtype=torch.long, device="cpu")
    ranked = _ranked(topology, values, min(most, int(topology.col_sizes.max())))
    first, second = torch.triu_indices(groups, groups, offset=1, device="cpu")
    there, back = ranked[first, second], ranked[second, first]
    paired = (there >= 0) & (back >= 0)
    worth = torch.where(paired, values[second[:, None], there] + values[first[:, None], back], -torch.inf)
    positive = (worth > 0).nonzero()
    order = torch.sort(worth[positive[:, 0], positive[:, 1]], descending=True, stable=True).indices
    positive = positive[order]
    candidates = torch.stack([there[positive[:, 0], positive[:, 1]], back[positive[:, 0], positive[:, 1]]], 1)
    chosen: list[list[int]] = []
    touched: set[int] = set()
    for one, other in candidates.tolist():
        if one not in touched and other not in touched:
            chosen.append([one, other])
            touched |= {one, other}
            if len(chosen) == most:
                break
    return torch.tensor(chosen, dtype=torch.long, device="cpu").reshape(-1, 2)


def random_swaps(topology: BlockTopology, count: int, generator: torch.Generator) -> Tensor:
    """Swaps of random inputs between random sets, each input at most once: the control for `choose_swaps`.

    Args:
        topology: shape ``(m, n)``.
        count: how many; fewer where the inputs run out.
        generator: of the choice.

    Returns:
        Pairs of inputs in different sets, shape ``(swaps, 2)``.

    Example:
        >>> t = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> swaps = random_swaps(t, 2, torch.Generator().manual_seed(0))
        >>> bool((t.col_set[swaps[:, 0]] != t.col_set[swaps[:, 1]]).all())
        True
    """
    noise = torch.rand(topology.groups, topology.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    noise[:, topology.col_set < 0] = -torch.inf
    joined = (topology.col_set >= 0).nonzero().flatten()
    noise[topology.col_set[joined], joined] = -torch.inf
    return choose_swaps(topology, noise, count)


def swapped(topology: BlockTopology, swaps: Tensor) -> BlockTopology:
    """The topology after swaps of inputs; sets keep their numbers, sizes and outputs.

    Args:
        topology: shape ``(m, n)``.
        swaps: pairs of inputs, each input at most once, shape ``(swaps, 2)``.

    Raises:
        ValueError: if an input is swapped twice.

    Example:
        >>> t = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> swapped(t, torch.tensor([[1, 3]])).col_set.tolist()
        [0, 1, 1, 0]
    """
    if len(swaps.unique()) < swaps.numel():
        raise ValueError(f"each input can be swapped once at a time, got {swaps.tolist()}")
    col_set = topology.col_set.clone()
    col_set[swaps[:, 0]], col_set[swaps[:, 1]] = topology.col_set[swaps[:, 1]], topology.col_set[swaps[:, 0]]
    return BlockTopology(topology.row_set, col_set)


def _ranked(topology: BlockTopology, values: Tensor, depth: int) -> Tensor:
    """For every set and every other one its inputs by their score there, best first; ``(groups, groups, depth)``.

    -1 where a set has fewer inputs, or a move is not to be had.
    """
    groups = topology.groups
    out = torch.full((groups, groups, depth), -1, device="cpu")
    for index, members in enumerate(topology.col_order.split(topology.col_sizes.tolist())):
        inside = values[:, members]
        order = torch.sort(inside, dim=1, descending=True, stable=True).indices[:, :depth]
        best = torch.where(inside.gather(1, order) > -torch.inf, members[order], -1)
        out[index, :, : best.shape[1]] = best
    return out
