"""Reachability: hand-made chains, and the laws of the two topologies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sao_prune
from sao_prune import analysis
from sao_prune.topology import BlockTopology, interleaved, ramanujan


def test_a_chain_by_hand():
    first = torch.tensor([[1, 0], [1, 0], [0, 1]])
    second = torch.tensor([[0, 1, 0], [0, 0, 1]])
    assert analysis.reachability([first, second]).int().tolist() == [[1, 0], [0, 1]]
    assert analysis.reachability([first, second], 1, 1).int().tolist() == second.tolist()


@given(st.integers(2, 5), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_interleaved_reaches_everything_in_the_fewest_possible_layers(degree, power):
    n = degree**power
    topology = interleaved(n, n, n // degree)
    assert analysis.depth_to_full_reachability(topology) == power == analysis.least_depth(n, degree)


@pytest.mark.parametrize("degree", [2, 4, 8, 16])
def test_interleaved_at_128(degree):
    assert analysis.depth_to_full_reachability(interleaved(128, 128, 128 // degree)) == analysis.least_depth(
        128, degree
    )


@given(st.integers(2, 6), st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_identical_partitions_never_reach_everything(groups, size):
    sets = torch.arange(groups).repeat_interleave(size)
    assert analysis.depth_to_full_reachability(BlockTopology(sets, sets)) is None


def test_no_topology_beats_the_least_depth():
    for seed in range(3):
        layers = [ramanujan(64, 64, 16, torch.Generator().manual_seed(10 * seed + i)) for i in range(12)]
        depth = analysis.depth_to_full_reachability(layers)
        assert depth is not None
        assert depth >= analysis.least_depth(64, 4)


def test_flattened_feature_maps_follow_channels():
    conv = torch.tensor([[1, 0], [0, 1]])
    linear = torch.tensor([[1, 1, 0, 0]])
    assert analysis.reachability([conv, linear]).int().tolist() == [[1, 0]]


def test_bad_input():
    with pytest.raises(ValueError, match="layer 1 has 3 inputs"):
        analysis.reachability([torch.ones(2, 2), torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"numbered 0 \.\. 0"):
        analysis.reachability([torch.ones(2, 2)], 0, 3)
    with pytest.raises(ValueError, match="prune it first"):
        analysis.reachability(torch.nn.Linear(2, 2))


class Backwards(torch.nn.Module):
    """Runs its layers in the reverse order of their registration."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(16, 5)
        self.first = torch.nn.Linear(8, 16)

    def forward(self, x):
        return self.last(self.first(x))


def test_a_model_is_chained_in_the_order_of_execution():
    model, options = Backwards(), {"skip_first": False, "skip_last": False, "seed": 0}
    sao_prune.apply(model, groups=4, **options)
    x = torch.zeros(1, 8)
    expected = analysis.reachability([model.first.weight_mask, model.last.weight_mask])
    assert torch.equal(analysis.reachability(model, example_input=x), expected)
    with pytest.raises(ValueError, match="layer 1 has 8 inputs"):
        analysis.reachability(model)
    sao_prune.compact(model)
    assert torch.equal(analysis.reachability(model, example_input={"x": x}), expected)
