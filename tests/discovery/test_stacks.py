"""Parameters of three or more dimensions that are no kernels: every matrix of the stack is pruned for itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune import EOI, GMP, LMP, LRP, RG, SAO
from sao_prune.discovery import Selection, walk
from sao_prune.topology import BlockTopology

ALL = {"skip_first": False, "skip_last": False}
METHODS = [
    SAO(),
    SAO(variant=2),
    SAO(topology="interleaved"),
    SAO(conv="eco"),
    RG(),
    RG(values="normal"),
    RG(values="uniform", topology="interleaved"),
    EOI(),
    LMP(),
    LRP(),
    GMP(),
]


class Raw(nn.Module):
    def __init__(self, *shape, name="weight"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(*shape)))


def pruned(shape, method, sparsity=0.5):
    """The masked weight and the mask, as ``(parts, m, n)``, and the report."""
    model = Raw(*shape)
    plan = sao_prune.plan(model, sparsity, include=["weight"], method=method, **ALL)
    report = sao_prune.apply(model, sparsity, include=["weight"], method=method, seed=0, **ALL)
    assert [layer.nnz for layer in plan.layers] == [layer.nnz for layer in report.layers] or isinstance(method, EOI)
    return model.weight.detach().flatten(0, -3), model.weight_mask.flatten(0, -3), report, model


@settings(max_examples=30, deadline=None)
@given(
    parts=st.integers(1, 5),
    rows=st.integers(2, 24),
    cols=st.integers(2, 24),
    sparsity=st.sampled_from([0.3, 0.5, 0.75]),
    method=st.sampled_from(METHODS),
)
@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
def test_every_matrix_of_a_stack_has_its_share(parts, rows, cols, sparsity, method):
    weight, mask, report, model = pruned((parts, rows, cols), method, sparsity)
    (layer,) = report.pruned
    kept = mask.sum((1, 2))
    assert int(kept.sum()) == layer.nnz
    assert layer.note == (f"{parts} matrices" if parts > 1 else "")
    assert not weight[mask == 0].any()
    if method.layerwise:
        # The next best number of edges may differ from matrix to matrix only where supports are irregular.
        assert kept.max() - kept.min() <= (
            0 if method.structured or isinstance(method, (LMP, LRP)) else max(rows, cols)
        )
    if method.structured:
        assert {BlockTopology.from_mask(one).groups for one in mask} == {layer.groups}
    if isinstance(method, SAO) and method.structured:
        values = torch.linalg.svdvals(weight)
        assert torch.allclose(values, torch.ones_like(values), atol=1e-5)
    (read,) = sao_prune.report(model).pruned
    assert (read.nnz, read.note) == (layer.nnz, layer.note)


def test_each_matrix_has_its_own_topology():
    for method in (SAO(), RG(), SAO(topology="expander")):
        _, mask, _, _ = pruned((4, 16, 16), method, 0.75)
        assert len({tuple(one.flatten().tolist()) for one in mask}) == 4


def test_bilinear_is_a_stack_over_its_outputs():
    layer = nn.Bilinear(8, 6, 5)
    (weight,) = walk(layer, Selection(include=["weight"], **ALL))
    assert (weight.parts, weight.matrix, weight.kernel) == (5, (8, 6), ())
    sao_prune.prune.sao(layer, "weight", groups=2, seed=0)
    assert layer.weight_mask.sum((1, 2)).tolist() == [24] * 5
    x, y = torch.randn(3, 8), torch.randn(3, 6)
    expected = torch.einsum("bi,oij,bj->bo", x, layer.weight_orig * layer.weight_mask, y) + layer.bias
    assert torch.allclose(layer(x, y), expected, atol=1e-5)


def test_literal_masks_of_a_stack():
    model = Raw(2, 2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[[4.0, 1], [3, 2]], [[8, 5], [6, 7]]]))
    options = {"include": ["weight"], **ALL}
    sao_prune.apply(model, 0.5, method="lmp", **options)
    assert model.weight_mask.tolist() == [[[1, 0], [1, 0]], [[1, 0], [0, 1]]]
    sao_prune.remove(model)
    other = Raw(2, 2, 2)
    with torch.no_grad():
        other.weight.copy_(torch.tensor([[[4.0, 1], [3, 2]], [[8, 5], [6, 7]]]))
    sao_prune.apply(other, 0.5, method="gmp", **options)
    assert other.weight_mask.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]


def test_more_than_three_dimensions_and_kernels():
    weight, mask, report, _ = pruned((2, 3, 8, 8), SAO(), 0.75)
    assert report.layers[0].note == "6 matrices"
    assert mask.sum((1, 2)).tolist() == [16] * 6
    assert torch.allclose(torch.linalg.svdvals(weight), torch.ones(6, 8), atol=1e-5)
    conv = nn.Sequential(nn.Conv1d(8, 8, 3))
    sao_prune.apply(conv, 0.75, **ALL)
    assert conv[0].weight_mask.sum((0, 1)).tolist() == [16] * 3


def test_a_stack_that_has_no_view_is_refused_with_a_reason():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 2, 8, 8).transpose(0, 1))
    (found,) = walk(model, Selection(include=["weight"], **ALL))
    assert "make it contiguous" in found.reason
    with pytest.raises(ValueError, match="make it contiguous"):
        sao_prune.prune.sao(model, "weight", 0.5)


class PlainExperts(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        up, down = ((4, 64, 96), (4, 96, 64)) if transposed else ((4, 96, 64), (4, 64, 96))
        self.up_proj = nn.Parameter(torch.randn(*up))
        self.up_proj_bias = nn.Parameter(torch.zeros(4, 96))
        self.down_proj = nn.Parameter(torch.randn(*down))
        if transposed:
            self.is_transposed = True


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_pruned_like_layers(transposed):
    net = nn.Sequential(nn.Linear(64, 64), PlainExperts(transposed), nn.Linear(64, 64))
    found = {w.name: w for w in walk(net)}
    assert found["1.up_proj"].matrix == (96, 64)
    assert found["1.down_proj"].matrix == (64, 96)
    report = sao_prune.apply(net, 0.75, seed=0)
    assert [layer.note for layer in report.pruned] == ["4 matrices"] * 2
    assert torch.allclose(torch.linalg.svdvals(net[1].up_proj), torch.ones(4, 64), atol=1e-5)
    assert {layer.name: layer.reason for layer in report.others}["1.up_proj_bias"] == "bias"
    again = sao_prune.report(net)
    assert [(a.name, a.nnz, a.groups) for a in again.pruned] == [(a.name, a.nnz, a.groups) for a in report.pruned]
    sao_prune.remove(net)
    assert sao_prune.report(net).nnz == report.nnz


def test_experts_at_the_end_are_the_last_layer_by_their_last_matrix():
    reasons = {w.name: w.reason for w in walk(nn.Sequential(PlainExperts(), PlainExperts()))}
    assert reasons == {"0.up_proj": "first layer", "0.down_proj": None, "1.up_proj": None, "1.down_proj": "last layer"}


def test_a_stack_is_saved_and_loaded(tmp_path):
    net = nn.Sequential(nn.Linear(64, 64), PlainExperts(), nn.Linear(64, 64))
    sao_prune.apply(net, 0.75, seed=0)
    fresh = nn.Sequential(nn.Linear(64, 64), PlainExperts(), nn.Linear(64, 64))
    sao_prune.load(fresh, sao_prune.save(net, tmp_path / "m.safetensors"))
    assert torch.equal(fresh[1].up_proj, net[1].up_proj)
    sao_prune.remove(net)
    other = nn.Sequential(nn.Linear(64, 64), PlainExperts(), nn.Linear(64, 64))
    sao_prune.apply(other, 0.75, seed=1)
    with pytest.raises(sao_prune.CheckpointError, match="sparse already"):
        sao_prune.load(other, sao_prune.save(net, tmp_path / "b.safetensors"))


@pytest.mark.parametrize("method", [sao_prune.SNIP, sao_prune.SynFlow])
def test_saliency_methods_take_stacks(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = PlainExperts()

        def forward(self, x):
            hidden = torch.einsum("bi,eoi->ebo", x, self.experts.up_proj).relu()
            return torch.einsum("ebi,eoi->bo", hidden, self.experts.down_proj)

    x = torch.randn(16, 64)
    options = {"inputs": x, "targets": torch.arange(16)} if method is sao_prune.SNIP else {"inputs": x, "rounds": 3}
    report = sao_prune.apply(Net(), 0.75, method=method(**options), **ALL)
    assert report.nnz == round(0.25 * 2 * 4 * 96 * 64)
