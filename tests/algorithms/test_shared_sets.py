"""Layers that feed each other on one partition of the channels between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune import Project
from sao_prune.blocks.epilogue import detach
from sao_prune.blocks.folding import fold
from sao_prune.blocks.permutation import Kind
from sao_prune.discovery.dataflow import record
from sao_prune.discovery.feeding import feeds
from sao_prune.topology import BlockTopology, clustered_pair, even_sizes, followed

from .cases import ALL
from .test_project import correlated

pytestmark = pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")


def partition(labels):
    return {frozenset(torch.nonzero(labels == k).flatten().tolist()) for k in labels.unique()}


def linear(hidden=24, outputs=16):
    return nn.Sequential(nn.Linear(12, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, outputs))


def convolutional(hidden=16):
    return nn.Sequential(
        nn.Conv2d(8, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(hidden, 8, 1)
    )


def topology(net, place):
    mask = net[place].weight_mask
    return BlockTopology.from_mask(mask.flatten(2).amax(2) if mask.dim() > 2 else mask)


@pytest.mark.parametrize(
    ("net", "x", "groups"),
    [
        (linear(), correlated(64, 0, 12), 4),
        (linear(23, 18), correlated(64, 0, 12), 5),
        (convolutional(), correlated(16, 0, 8, 6, 6), 4),
    ],
)
def test_a_pair_has_one_partition_and_no_channel_moves_between_them(net, x, groups):
    torch.manual_seed(0)
    report = sao_prune.apply(net, groups=groups, method=Project(x, shared_sets=True), seed=0, **ALL)
    last = len(net) - 1
    assert partition(topology(net, 0).row_set) == partition(topology(net, last).col_set)
    assert "sets" in report.layers[-1].note
    wanted = net.eval()(x)
    if groups == 4:
        sao_prune.compact(net, example_input=x[:2])
        detach(net)
        assert fold(net, x[:2]) == 1
        layers = [m for m in net.modules() if hasattr(m, "layout")]
        assert layers[0].layout.outputs.kind is layers[1].layout.inputs.kind is Kind.IDENTITY
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-4)


def test_schedules_split_both_sides_alike():
    torch.manual_seed(0)
    net, x = linear(), correlated(64, 0, 12)
    method, over = Project(x, shared_sets=True), sao_prune.Schedule(1, 5, 3)
    pruner = sao_prune.schedule(net, method, groups=4, over=over, seed=0, **ALL)
    sparsities = set()
    while not pruner.finished:
        pruner.step()
        sparsities.add(pruner.sparsity)
        assert partition(topology(net, 0).row_set) == partition(topology(net, 3).col_set)
    assert sparsities == {0.5, 0.75}


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(6, 14), st.integers(6, 14), st.integers(6, 14), st.integers(0, 99))
def test_rows_follow_given_columns(groups, rows, hidden, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    first, then = torch.rand(hidden, cols, generator=generator), torch.rand(rows, hidden, generator=generator)
    sizes, then_sizes = even_sizes(hidden, cols, groups), even_sizes(rows, hidden, groups)
    made = clustered_pair(first, then, sizes, then_sizes[0], generator)
    after = followed(then, made.row_set, then_sizes)
    assert sorted(made.row_sizes.tolist()) == sorted(sizes[0].tolist())
    assert sorted(made.col_sizes.tolist()) == sorted(sizes[1].tolist())
    assert partition(after.col_set) == partition(made.row_set)
    assert sorted(after.row_sizes.tolist()) == sorted(then_sizes[0].tolist())


def test_blocks_that_two_weights_share_are_found():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.arange(12) % 3
    first = (hidden[:, None] == torch.arange(6) % 3).float() + 0.01
    then = (torch.arange(9)[:, None] % 3 == hidden).float() + 0.01
    sizes = even_sizes(12, 6, 3)
    made = clustered_pair(first, then, sizes, even_sizes(9, 12, 3)[0], generator)
    assert partition(made.row_set) == partition(hidden)
    assert partition(followed(then, made.row_set, even_sizes(9, 12, 3)).row_set) == partition(torch.arange(9) % 3)


def test_columns_in_sets_of_other_sizes_are_not_followed():
    assert followed(torch.rand(4, 4), torch.tensor([0, 0, 0, 1]), even_sizes(4, 4, 2)) is None


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        return self.c(self.b(y).relu() + y) + self.d(self.d(x))


def test_forks_sums_and_shared_layers_are_no_pairs():
    assert feeds(record(Forked(), torch.zeros(1, 4))) == {}


def test_rules_have_their_own_sets():
    with pytest.raises(ValueError, match="clustered"):
        Project(torch.zeros(4, 4), topology="ramanujan", shared_sets=True)
