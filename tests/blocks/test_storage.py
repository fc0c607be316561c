"""What storage counts, and that a saved compact model takes no more than its values and orders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.analysis import storage


def _net(width: int = 512) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))


@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_counts_of_a_matrix_are_the_thesis_formulas(topology):
    net = _net(64)
    sao_prune.apply(net, groups=8, method=sao_prune.SAO(topology=topology), seed=0)
    masked = storage(net).layers[1]
    nnz = 64 * 64 // 8
    assert (masked.values, masked.dense) == (nnz, 64 * 64)
    assert (masked.csr, masked.blocks) == (2 * nnz + 64 + 1, nnz + 64 + 1)
    baked, compact = copy.deepcopy(net), copy.deepcopy(net)
    sao_prune.remove(baked)
    sao_prune.compact(compact)
    for other in (baked, compact):
        (layer,) = (layer for layer in storage(other).layers if layer.name == "1.weight")
        assert layer == masked


def test_irregular_and_dense_layers():
    net = _net(16)
    sao_prune.apply(net, sparsity=0.75, method="lrp", seed=0)
    first, second, _ = storage(net).layers
    assert (first.csr, first.blocks) == (2 * 256 + 17, None)
    assert (second.csr, second.blocks) == (2 * 64 + 17, None)
    assert storage(net).dense == 3 * 256
    assert storage(net).bytes("dense") == 4 * 3 * 256
    assert storage(net).bytes("csr") == 4 * (256 + 145 + 256)
    with pytest.raises(ValueError, match="'dense', 'csr' or 'blocks'"):
        storage(net).bytes("coo")


def test_grouped_convolution_counts_each_part():
    net = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2, bias=False))
    sao_prune.apply(net, groups=4, seed=0, skip_first=False, skip_last=False)
    before = storage(net).layers[0]
    assert before.values == 16 * 8 * 9 // 4
    sao_prune.compact(net)
    assert storage(net).layers[0] == before


def test_file_is_values_and_orders(tmp_path):
    net = _net()
    sao_prune.apply(net, sparsity=0.96875, seed=0, skip_first=False, skip_last=False)
    sao_prune.compact(net)
    file = sao_prune.save(net, tmp_path / "net.safetensors")
    assert file.stat().st_size <= 1.02 * storage(net).bytes("blocks")
    fresh = _net()
    sao_prune.load(fresh, file)
    x = torch.randn(2, 512)
    assert torch.equal(fresh(x), net(x))
