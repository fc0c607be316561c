"""ECO convolutions: orthogonality is that of the dense operator, never of the formula that made it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.analysis import singular_values
from sao_prune.nn import ECOConv2d, InexactConvolutionWarning
from sao_prune.topology import BlockTopology, interleaved
from sao_prune.weights import eco_blocks, frequencies_from_kernel, kernel_from_frequencies
from sao_prune.weights.eco import free_frequencies


def spread(layer, shape):
    values = singular_values(layer, shape)
    return float((values - layer.gain).abs().max())


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_is_orthogonal_whenever_it_says_so(data):
    kernel = data.draw(st.integers(1, 5), "kernel")
    stride = data.draw(st.integers(1, 3), "stride")
    times = data.draw(st.integers(1, 3), "times")
    cin, cout = data.draw(st.integers(1, 5), "in"), data.draw(st.integers(1, 7), "out")
    groups = data.draw(st.integers(1, min(cin * stride**2, cout)), "groups")
    n = kernel * stride * times if kernel * stride * times <= 12 else kernel * stride
    layer = ECOConv2d(cin, cout, kernel, stride, groups, gain=1.1, seed=data.draw(st.integers(0, 99)))
    assert layer.exact_at(n)
    assert spread(layer, (cin, n, n)) < 1e-5


@pytest.mark.parametrize(("kernel", "size"), [(3, (3, 6)), ((3, 1), (6, 5)), (3, (1, 1)), (4, (2, 2)), (4, (1, 8))])
def test_other_sizes_that_are_exact(kernel, size):
    layer = ECOConv2d(4, 4, kernel, groups=2, input_size=size, seed=0)
    assert layer.exact_at(size)
    assert "exact" in repr(layer)
    assert spread(layer, (4, *size)) < 1e-5


def test_says_where_it_is_not_orthogonal_and_means_it():
    layer = ECOConv2d(4, 4, 3, seed=0)
    with pytest.warns(InexactConvolutionWarning, match="does not divide"):
        layer(torch.zeros(1, 4, 8, 8))
    assert "NOT orthogonal" in repr(layer)
    assert spread(layer, (4, 8, 8)) > 0.1


def test_warns_once(recwarn):
    layer = ECOConv2d(4, 4, 3, seed=0)
    for _ in range(3):
        layer(torch.zeros(1, 4, 8, 8))
    assert len([w for w in recwarn if w.category is InexactConvolutionWarning]) == 1


def test_blocks_compute_what_the_dense_kernel_computes():
    sparse = ECOConv2d(6, 8, 3, stride=2, groups=5, seed=3)
    dense = ECOConv2d(6, 8, 3, stride=2, seed=3)
    dense.weight.data.copy_(sparse.dense_weight())
    dense.bias.data.copy_(sparse.bias.data.normal_())
    x = torch.randn(2, 6, 12, 12)
    torch.testing.assert_close(sparse(x), dense(x))
    assert sparse.weight.numel() < dense.weight.numel() / 3


def test_state_dict_and_copies_carry_the_topology():
    layer, other = ECOConv2d(6, 9, 3, groups=4, seed=0), ECOConv2d(6, 9, 3, groups=4, seed=1)
    x = torch.randn(1, 6, 6, 6)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_seed_decides_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    a, b, c = (ECOConv2d(4, 4, 3, groups=2, seed=s).weight for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 4, 0), "positive"), ((0, 4, 3), "positive"), ((4, 4, 3, 1, 5), "groups"), ((4, 4, 3, 1, 0), "groups")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ECOConv2d(*arguments)


def test_stride_must_divide():
    with pytest.raises(ValueError, match="stride 2 must divide"):
        ECOConv2d(4, 4, 3, 2)(torch.zeros(1, 4, 5, 6))


@pytest.mark.parametrize("k", range(1, 6))
def test_number_of_free_matrices(k):
    assert len(free_frequencies((k, k))[0]) == ((k * k + 1) // 2 if k % 2 else (k * k + 4) // 2)


@pytest.mark.parametrize("kernel", [(3,), (4,), (3, 3), (4, 4), (2, 5), (3, 2, 3)])
def test_kernel_is_the_inverse_transform_of_a_symmetric_spectrum(kernel):
    frequencies = torch.randn(len(free_frequencies(kernel)[0]), 2, 3, dtype=torch.float64)
    taps = kernel_from_frequencies(frequencies, kernel)
    torch.testing.assert_close(frequencies_from_kernel(taps, kernel), frequencies)
    transformed = torch.fft.fftn(taps.unflatten(-1, kernel), dim=tuple(range(2, 2 + len(kernel))))
    assert transformed.imag.abs().max() < 1e-12
    torch.testing.assert_close(
        transformed.real.flatten(2)[..., free_frequencies(kernel)[0]].movedim(-1, 0), frequencies
    )


def test_kernel_level_sparsity_survives_the_transform():
    topology = interleaved(6, 9, 3)
    (blocks,) = eco_blocks([topology], [(3, 3)], [torch.Generator().manual_seed(0)])
    full = torch.zeros(54, 9)
    for index, values in zip(topology.flat_index, blocks):
        full[index] = values.flatten(0, 2)
    assert BlockTopology.from_mask((full != 0).any(1).view(6, 9)) == topology
