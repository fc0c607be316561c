"""What each method keeps and writes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune import GMP, LMP, LRP, RG, SAO
from sao_prune.algorithms.magnitude import keep_top
from sao_prune.topology import BlockTopology

ALL = {"skip_first": False, "skip_last": False}


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def topology(layer):
    mask = layer.weight_mask
    return BlockTopology.from_mask(mask.flatten(2).amax(2) if mask.dim() > 2 else mask)


@given(st.integers(2, 40), st.integers(2, 40), st.sampled_from([(), (3,), (2, 3), (1, 2, 3)]), st.data())
@settings(deadline=None, max_examples=60)
def test_sao_layers_of_any_shape_are_exactly_orthogonal(rows, cols, kernel, data):
    groups = data.draw(st.integers(1, min(rows, cols)))
    gain = data.draw(st.sampled_from([0.5, 1.0, 1.1]))
    variant = data.draw(st.sampled_from([1, 2, 3]))
    kind = data.draw(st.sampled_from(["ramanujan", "interleaved"]))
    conv = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel)]
    layer = conv(cols, rows, kernel) if kernel else conv(cols, rows)
    sao_prune.prune.sao(layer, groups=groups, method=SAO(variant, kind, gain), seed=data.draw(st.integers(0, 99)))
    flat = layer.weight.detach().reshape(rows, -1)
    singular = torch.linalg.svdvals(layer.weight.detach().flatten(2).sum(2) if kernel else flat)
    assert (singular - gain).abs().max() < 1e-5
    assert topology(layer).groups == groups
    assert bool((layer.weight_orig[layer.weight_mask == 0] == 0).all())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Conv2d(16, 8, 1),
        nn.ConvTranspose2d(8, 16, 1),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv1d(12, 12, 5, padding=2),
    ],
)
def test_delta_convolutions_are_isometric_operators(layer):
    """The dense Jacobian of the convolution itself, zero padding and stride 1."""
    sao_prune.prune.sao(layer, groups=2, seed=0)
    shape = (layer.in_channels, 5, 5) if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else (12, 9)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.zeros(shape))
    size = torch.Size(shape).numel()
    singular = torch.linalg.svdvals(jacobian.reshape(-1, size))
    assert (singular - 1).abs().max() < 1e-5


@pytest.mark.parametrize("module", [nn.LSTM(16, 16), nn.GRU(12, 16), nn.MultiheadAttention(16, 2)])
def test_stacked_matrices_are_orthogonal_one_by_one(module):
    sao_prune.apply(nn.ModuleList([module]), groups=4, seed=0, **ALL)
    weights = [(n, w) for n, w in module.named_buffers() if n.endswith("_mask")]
    assert weights
    for name, mask in weights:
        tensor = getattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2][:-5])
        parts = max(1, tensor.shape[0] // 16)
        for matrix, part in zip(tensor.chunk(parts), mask.chunk(parts)):
            assert (torch.linalg.svdvals(matrix) - 1).abs().max() < 1e-5
            assert BlockTopology.from_mask(part).groups == 4


def test_variants():
    def apply(variant):
        net = mlp(32, 32, 32, 32)
        sao_prune.apply(net, groups=8, method=SAO(variant=variant), seed=0, **ALL)
        return net

    one, two, three = apply(1), apply(2), apply(3)
    assert topology(one[0]) == topology(one[1])
    assert not torch.equal(one[0].weight, one[1].weight)
    assert topology(two[0]) == topology(two[1])
    (blocks,) = topology(two[0]).gather(two[0].weight.detach())
    assert torch.equal(blocks, blocks[:1].expand_as(blocks))
    assert topology(three[0]) != topology(three[1])


def test_a_layers_draw_depends_on_the_seed_and_its_name_alone():
    small, large = mlp(16, 16, 16), mlp(16, 16, 16, 16, 16)
    sao_prune.apply(small, groups=4, seed=5, method=SAO(variant=3), **ALL)
    sao_prune.apply(large, groups=4, seed=5, method=SAO(variant=3), **ALL)
    other = mlp(16, 16, 16)
    sao_prune.apply(other, groups=4, seed=6, method=SAO(variant=3), **ALL)
    assert torch.equal(small[1].weight, large[1].weight)
    assert not torch.equal(small[1].weight, other[1].weight)


@pytest.mark.parametrize("method", [SAO(), SAO(variant=3), RG(values="normal"), RG(values="uniform"), LRP(), GMP()])
def test_global_generator_is_untouched(method):
    net = mlp(16, 16, 16, 16)
    state = torch.get_rng_state()
    sao_prune.apply(net, groups=4, method=method, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    sao_prune.apply(mlp(16, 16, 16, 16), groups=4, method=method)
    assert not torch.equal(torch.get_rng_state(), state)  # making the second network drew, apply did not


def test_seed_may_be_a_generator():
    def weight(seed):
        net = mlp(16, 16, 16, 16)
        sao_prune.apply(net, groups=4, seed=seed)
        return net[1].weight

    generator = torch.Generator().manual_seed(1)
    first, second = weight(generator), weight(generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, weight(torch.Generator().manual_seed(1)))
    with pytest.raises(TypeError, match="seed must be"):
        weight("0")


def test_rg_keep_masks_the_weight_as_it_is():
    net = mlp(16, 16, 16, 16)
    before = net[1].weight.detach().clone()
    sao_prune.apply(net, groups=4, method="rg", seed=0)
    assert torch.equal(net[1].weight, before * net[1].weight_mask)
    assert torch.equal(net[1].weight_orig, before)
    twin = mlp(16, 16, 16, 16)
    sao_prune.apply(twin, groups=4, seed=0)
    assert torch.equal(net[1].weight_mask, twin[1].weight_mask)


@pytest.mark.parametrize("values", ["normal", "uniform"])
def test_rg_values_fill_every_tap_at_the_scale_of_the_matrix(values):
    conv = sao_prune.prune.ramanujan(nn.Conv2d(64, 64, 3), groups=4, method=RG(values=values), seed=0)
    inside = conv.weight[conv.weight_mask.bool()]
    assert bool((inside != 0).all())
    assert inside.std().item() == pytest.approx((1 / (16 * 9)) ** 0.5, rel=0.05)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_keep_top_keeps_the_exact_count_earlier_ties_first(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    keep = keep_top(torch.tensor(scores, dtype=torch.float32), count)
    by_rank = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert sorted(by_rank[:count]) == torch.nonzero(keep).flatten().tolist()


def test_lmp_and_gmp_exact_masks():
    net = mlp(2, 2, 2)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0, -3.0], [2.0, 1.0]]))
        net[1].weight.copy_(torch.tensor([[0.4, 0.3], [0.2, -0.1]]))
    local, overall = (sao_prune.apply(n := _clone(net), sparsity=0.5, method=m, **ALL) and n for m in (LMP(), GMP()))
    assert local[0].weight_mask.tolist() == [[1, 1], [0, 0]]
    assert local[1].weight_mask.tolist() == [[1, 1], [0, 0]]
    assert overall[0].weight_mask.tolist() == [[1, 1], [1, 1]]
    assert overall[1].weight_mask.tolist() == [[0, 0], [0, 0]]


def _clone(net):
    twin = mlp(2, 2, 2)
    twin.load_state_dict(net.state_dict())
    return twin


def test_gmp_spends_its_budget_of_weights_over_kernels_of_different_size():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5))
    report = sao_prune.apply(net, sparsity=0.8, method="gmp", **ALL)
    total = sum(m.weight.numel() for m in net)
    assert abs(report.nnz - 0.2 * total) < 25
    for conv in net:
        kept = conv.weight_mask.flatten(2)
        assert bool((kept == kept[:, :, :1]).all())


def test_lrp_keeps_an_exact_random_count():
    net = mlp(20, 20, 20)
    report = sao_prune.apply(net, sparsity=0.9, method="lrp", seed=0, **ALL)
    assert [layer.nnz for layer in report.layers] == [40, 40]
    assert not torch.equal(net[0].weight_mask, net[1].weight_mask)


def test_mirrored_relu_chain_is_an_orthogonal_map():
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), *[m for _ in range(20) for m in (nn.Linear(64, 64), nn.ReLU())], nn.Linear(64, 32)
    )
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    sao_prune.apply(net, groups=4, method=SAO(nonlinearity="relu"), seed=0, **ALL)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x), torch.randn(32))
    assert (torch.linalg.svdvals(jacobian) - 1).abs().max() < 1e-4


def test_mirrored_weights_need_pairs():
    with pytest.raises(ValueError, match=r"0\.weight: mirrored weights pair the outputs up, but there are 7"):
        sao_prune.apply(mlp(8, 7, 8), groups=2, method=SAO(nonlinearity="relu"), **ALL)
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="consists of 2 separate matrices"):
        sao_prune.apply(grouped, groups=2, method=SAO(nonlinearity="relu"), **ALL)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SAO(variant=4), ValueError, "variant must be one of 1, 2, 3"),
        (lambda: SAO(topology="ring"), ValueError, "topology must be one of"),
        (lambda: SAO(gain=0), ValueError, "positive finite"),
        (lambda: SAO(nonlinearity="gelu"), ValueError, "nonlinearity must be one of"),
        (lambda: RG(values="zeros"), ValueError, "values must be one of"),
        (
            lambda: sao_prune.apply(mlp(4, 4, 4), groups=2, method="soa"),
            ValueError,
            r"unknown method 'soa' \(did you mean 'sao'\?\); known:",
        ),
        (lambda: sao_prune.apply(mlp(4, 4, 4), groups=2, method=SAO), TypeError, r"did you mean SAO\(\)"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()
