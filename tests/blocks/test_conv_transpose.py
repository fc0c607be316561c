"""Transposed block convolutions are the dense ones with their weight, wherever those run."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import BlockConvTranspose1d, BlockConvTranspose2d, BlockConvTranspose3d, Execution
from sao_prune.blocks.modules import BlockConvTranspose, turned
from sao_prune.topology import BlockTopology, interleaved

from .cases import LAYOUTS, assert_all_close, randomise, topologies

_CLASSES = {1: BlockConvTranspose1d, 2: BlockConvTranspose2d, 3: BlockConvTranspose3d}


def _pair(dims: int, topology: BlockTopology, kernel: int, **options) -> tuple[BlockConvTranspose, nn.Module]:
    layer = _CLASSES[dims](topology, kernel, **options).double()
    randomise(layer)
    dense = layer.dense_class(layer.in_channels, layer.out_channels, kernel, **options).double()
    with torch.no_grad():
        dense.weight.copy_(turned(layer.weight, 1))
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return layer, dense


def _assert_same(layer: BlockConvTranspose, dense: nn.Module, x: Tensor, **options) -> None:
    results = []
    for module in (layer, dense):
        x = x.clone().requires_grad_()
        y = module(x, **options)
        loss = (y.square() * torch.arange(1, y[..., 0].numel() + 1).view(*y.shape[:-1], 1)).sum()
        parameters = [*module.parameters(), x]
        results.append([y, *torch.autograd.grad(loss, parameters)])
    (y, blocks, *mine), (expected, weight, *theirs) = results
    mask = layer.topology.mask().view(*layer.topology.shape, *[1] * len(layer.kernel_size))
    if x.dim() == 4 and expected.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert_all_close([y, layer.dense(blocks), *mine], [expected, turned(weight, 1) * mask, *theirs], 1e-9)


@given(
    st.integers(1, 3),
    topologies(12),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1]),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2]),
    st.sampled_from([Execution(), Execution(channels_last=True), Execution(dense=True)]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_dense_layer(dims, topology, kernel, stride, padding, outer, dilation, execution, bias, batched):
    outer = min(outer, max(stride, dilation) - 1)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": outer, "bias": bias}
    layer, dense = _pair(dims, topology, kernel, **options)
    layer.run_as(execution if dims == 2 else Execution(dense=execution.dense))
    shape = (2, layer.in_channels) if batched else (layer.in_channels,)
    x = torch.randn(*shape, *(5, 4, 4)[:dims], dtype=torch.float64)
    if execution.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    _assert_same(layer, dense, x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_options_that_are_changed_later_and_sizes_that_are_asked_for(dims):
    layer, dense = _pair(dims, interleaved(8, 12, 4), 3, stride=2)
    x, size = torch.randn(2, 12, *(5, 4, 3)[:dims], dtype=torch.float64), [12, 10, 8][:dims]
    _assert_same(layer, dense, x, output_size=size)
    assert_all_close([layer(input=x)], [layer(x)])
    _assert_same(layer, dense, x, output_size=(2, 8, *size))
    with pytest.raises(ValueError, match=r"output_size must be from \[11.* to \[12.*, got \[99"):
        layer(x, [99] * dims)
    for module in (layer, dense):
        vars(module).update(stride=(3,) * dims, padding=(1,) * dims, output_padding=(2,) * dims, dilation=(2,) * dims)
    _assert_same(layer, dense, x)
    layer.__dict__.update(stride=3, padding=1, output_padding=2, dilation=2)
    _assert_same(layer, dense, x)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("channels", [4, 11, 13, 24])
def test_inputs_of_other_channels_are_refused(layout, channels):
    layer = BlockConvTranspose2d(LAYOUTS[layout](8, 12, 4), 2, stride=2)
    with pytest.raises(RuntimeError, match="expected an input of 12 channels in dimension 1"):
        layer(torch.randn(2, channels, 4, 4))


class _UNet(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 2, stride=2)
        self.norm, self.up, self.head = nn.BatchNorm2d(32), up, nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.up(torch.relu(self.norm(self.down(x))), x.shape[-2:]) + x)


@pytest.mark.parametrize("parts", [1, 2])
def test_models_with_transposed_convolutions(parts, tmp_path):
    torch.manual_seed(0)
    model = _UNet(nn.ConvTranspose2d(32, 16, 2, stride=2, groups=parts)).eval()
    sao_prune.apply(model, groups=4, seed=0)
    x = torch.randn(2, 1, 9, 8)
    expected, masked = model(x), copy.deepcopy(model)
    report = sao_prune.compact(model, example_input=x)
    assert [layer.name for layer in report.compact] == ["down", "up"]
    assert isinstance(model.up, BlockConvTranspose2d)
    assert_all_close([model(x)], [expected], 1e-5)
    sao_prune.save(model, tmp_path / "compact.safetensors")
    other = _UNet(nn.ConvTranspose2d(32, 16, 2, stride=2, groups=parts)).eval()
    sao_prune.load(other, tmp_path / "compact.safetensors")
    assert_all_close([other(x)], [expected], 1e-5)
    assert [layer.groups for layer in sao_prune.report(other).layers if layer.name == "up.weight"] == [4 * parts]
    blocks = {name: getattr(other, name).blocks for name in ("down", "up")}
    sao_prune.expand(other)
    sao_prune.expand(model)
    assert type(other.up) is type(model.up) is nn.ConvTranspose2d
    assert torch.equal(other.up.weight, masked.up.weight)
    for name, tensor in masked.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    tuned = copy.deepcopy(masked)
    sao_prune.compact(tuned, example_input=x, tune="train")
    assert_all_close([tuned(x)], [expected], 1e-5)
    fresh = _UNet(nn.ConvTranspose2d(32, 16, 2, stride=2, groups=parts)).eval()
    sao_prune.apply(fresh, groups=4, seed=0, form="compact")
    for name in ("down", "up"):
        assert_all_close([getattr(fresh, name).blocks], [blocks[name]])


class _Sized(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return self.up(x, (like.shape[-2] - 2, like.shape[-1] + 8))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_transforms_compilers_and_export(layout):
    layer, dense = _pair(2, LAYOUTS[layout](8, 12, 4), 3, stride=2)
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    expected = dense(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,)).module()
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for run in (compiled, exported, traced, copy.deepcopy(layer)):
        assert_all_close([run(x)], [expected], 1e-9)
    sized = torch.fx.symbolic_trace(_Sized(layer))
    assert_all_close([sized(x, x[..., :2, 0])], [dense(x, (10, 10))], 1e-9)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    assert_all_close([tangent], [dense(x) - dense(torch.zeros_like(x))], 1e-9)
    assert_all_close([torch.vmap(layer)(x)], [expected], 1e-9)
    small = torch.randn(1, 12, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (small,))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float())
    assert y.dtype is torch.bfloat16


def test_several_layers_by_vmap():
    pair = [BlockConvTranspose2d(LAYOUTS[name](8, 12, 4), 2, stride=2) for name in ("strided", "irregular")]
    parameters, buffers = torch.func.stack_module_state(pair)
    x = torch.randn(3, 12, 4, 4)

    def call(p, b, x):
        return torch.func.functional_call(pair[0], (p, b), (x,))

    found = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_all_close(list(found), [layer(x) for layer in pair], 1e-5)
