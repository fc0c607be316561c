"""Moves of inputs between the sets of a topology: what is gained and lost, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.topology import BlockTopology, interleaved
from sao_prune.topology.rewire import choose_swaps, move_scores, random_swaps, set_energies, swapped
from sao_prune.weights import orthogonal_blocks
from sao_prune.weights.rewire import exchange_columns, keep_common

from ..strategies import topologies

seeds = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(topology: BlockTopology, seed: int) -> torch.Tensor:
    return torch.randn(topology.shape, generator=generator(seed)) * topology.mask()


@settings(max_examples=40)
@given(topologies(24), seeds, st.integers(0, 12))
def test_swaps_keep_sizes_edges_and_outputs(topology: BlockTopology, seed: int, most: int) -> None:
    gradient = torch.randn(topology.shape, generator=generator(seed))
    swaps = choose_swaps(topology, move_scores(topology, masked(topology, seed + 1), gradient), most)
    after = swapped(topology, swaps)
    assert len(swaps) <= most
    assert torch.equal(after.row_set, topology.row_set)
    assert torch.equal(after.col_sizes, topology.col_sizes)
    assert torch.equal(after.col_set < 0, topology.col_set < 0)
    assert swapped(after, swaps) == topology


@settings(max_examples=40)
@given(topologies(16), seeds)
def test_the_best_swap_is_the_best_of_all_pairs(topology: BlockTopology, seed: int) -> None:
    gradient = torch.randn(topology.shape, generator=generator(seed))
    scores = move_scores(topology, masked(topology, seed + 1), gradient).double()
    sets = topology.col_set.tolist()
    worth = [
        float(scores[sets[b], a] + scores[sets[a], b])
        for a in range(len(sets))
        for b in range(a)
        if sets[a] >= 0 and sets[b] >= 0 and sets[a] != sets[b]
    ]
    chosen = choose_swaps(topology, scores, 1).tolist()
    if max(worth, default=0.0) <= 0:
        assert chosen == []
    else:
        ((a, b),) = chosen
        assert float(scores[sets[b], a] + scores[sets[a], b]) == pytest.approx(max(worth))


def test_scores_are_what_would_be_gained_less_what_is_lost() -> None:
    topology = BlockTopology(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]))
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    gradient = torch.tensor([[9.0, 2.0], [9.0, -4.0], [1.0, 9.0], [1.0, 9.0]])
    # Absent edges have gradients of 2 on average, weights are 2 on average.
    assert move_scores(topology, weight, gradient).tolist() == [[-torch.inf, 0.0], [0.0, -torch.inf]]
    assert move_scores(topology, weight, 100 * gradient).tolist() == [[-torch.inf, 0.0], [0.0, -torch.inf]]


def test_a_convolution_counts_its_taps_together() -> None:
    topology = interleaved(4, 4, 2)
    kernels = torch.randn(4, 4, 3, 3)
    torch.testing.assert_close(set_energies(topology, kernels), set_energies(topology, kernels.abs().sum((2, 3))))


def test_random_swaps_are_drawn_from_the_generator_alone() -> None:
    topology = interleaved(32, 32, 4)
    one, two, other = (random_swaps(topology, 5, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(one) == 5


def test_an_input_is_not_swapped_twice() -> None:
    with pytest.raises(ValueError, match="once"):
        swapped(interleaved(4, 4, 2), torch.tensor([[0, 1], [1, 2]]))


@settings(max_examples=30)
@given(topologies(24), seeds)
def test_values_stay_on_the_topology(topology: BlockTopology, seed: int) -> None:
    swaps = random_swaps(topology, 4, generator(seed))
    after, weight = swapped(topology, swaps), masked(topology, seed)
    kept, exchanged = keep_common(weight, topology, after), exchange_columns(weight, swaps)
    for values in (kept, exchanged):
        assert not bool(values[~after.mask()].any())
    common = topology.mask() & after.mask()
    assert torch.equal(kept[common], weight[common])
    assert torch.equal(exchange_columns(exchanged, swaps), weight)


def test_exchanged_values_keep_a_layer_orthogonal() -> None:
    topology = interleaved(16, 16, 4)
    weight = topology.scatter(orthogonal_blocks([topology], [generator(0)])[0])
    moved = exchange_columns(weight, random_swaps(topology, 4, generator(1)))
    torch.testing.assert_close(moved @ moved.T, torch.eye(16), atol=1e-6, rtol=0)
    assert not torch.equal(moved != 0, weight != 0)
