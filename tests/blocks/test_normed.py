"""Batch norms with an activation as one operator, and dense convolutions that compute the norm behind them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sao_prune
from sao_prune.blocks import BlockConv2d, Plan
from sao_prune.blocks.batch_norm import batch_norm
from sao_prune.blocks.modules import NormedConv2d
from sao_prune.blocks.plan import carry_out, plan_of

from .calls import ACTS
from .cases import assert_all_close, needs_compiler, owners, randomise


def _operands(shape: tuple[int, ...], order: str, affine: bool, averages: bool) -> list[Tensor | None]:
    z = torch.randn(shape, dtype=torch.float64)
    if order == "last" and z.dim() == 4:
        z = z.contiguous(memory_format=torch.channels_last)
    elif order == "transposed":
        z = z.transpose(0, 1).contiguous().transpose(0, 1)
    numbers = [torch.rand(shape[1], dtype=torch.float64) + 0.5 for _ in range(4)]
    return [z, *(numbers[:2] if affine else (None, None)), *(numbers[2:] if averages else (None, None))]


def _dense(act: str, z: Tensor, gain: Tensor | None, offset: Tensor | None, *averages: Tensor | None) -> Tensor:
    return ACTS[act](F.batch_norm(z, *averages, gain, offset, averages[0] is None, 0.0, 1e-5))


_SHAPES = st.one_of(
    st.tuples(st.integers(2, 600), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 30)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 24), st.integers(2, 24)),
)


@needs_compiler
@given(
    _SHAPES, st.sampled_from(["rows", "last", "transposed"]), st.sampled_from(list(ACTS)), st.booleans(), st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_agreement_with_torch(shape, order, act, affine, averages):
    operands = _operands(shape, order, affine, averages)
    mine = [None if t is None else t.float() for t in operands]
    leaves = [[t.requires_grad_() for t in each[:3] if t is not None] for each in (mine, operands)]
    y, *moments = batch_norm(*mine, act, 1e-5)
    expected = _dense(act, *operands)
    assert_all_close([y], [expected], 1e-4)
    z = operands[0]
    if averages:
        assert_all_close(moments, operands[3:], 1e-6)
    else:
        dims = [d for d in range(z.dim()) if d != 1]
        assert_all_close(moments, list(torch.var_mean(z, dims, correction=0))[::-1], 1e-4)
    gradient = torch.randn_like(expected)
    found = torch.autograd.grad(y, leaves[0], gradient.float())
    wanted = torch.autograd.grad(expected, leaves[1], gradient)
    # Gradients cancel, the fewer values the more: one scale for all.
    scale = max(1.0, *(float(w.abs().max()) for w in wanted), float(gradient.abs().max()))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-3 * scale)
    assert found[0].stride() == mine[0].stride()


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize(("order", "act"), [("rows", "gelu"), ("last", "relu"), ("transposed", "tanh")])
def test_registration_and_derivatives(order, act, averages):
    torch.manual_seed(0)
    operands = _operands((3, 4, 5, 6), order, True, averages)
    leaves = [t.requires_grad_() for t in operands[:3]]

    def run(*leaves: Tensor) -> Tensor:
        return batch_norm(*leaves, *operands[3:], act, 1e-5)[0]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    for dtype in (torch.float32, torch.float64):
        cast = [None if t is None else t.detach().to(dtype) for t in operands]
        torch.library.opcheck(batch_norm.overload, ([t.requires_grad_() for t in cast[:3]] + cast[3:] + [act, 1e-5]))


def test_operands_that_do_not_fit_are_refused():
    z, gain, offset, mean, variance = _operands((2, 4, 3, 3), "rows", True, True)
    with pytest.raises(RuntimeError, match="one number a channel"):
        batch_norm(z, gain[:2], offset, mean, variance, "relu", 1e-5)
    with pytest.raises(RuntimeError, match="one number a channel"):
        batch_norm(z, gain, offset, mean[:3], variance, "", 1e-5)


def _model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5).eval()
    sao_prune.apply(model, sparsity=0.75, seed=0)
    return model, torch.randn(2, 3, 32, 32)


@needs_compiler
def test_dense_convolutions_of_a_model():
    """Those that run shows, in the table and in the plan; others, and those that the user leaves out, stay."""
    model, x = _model()
    expected, state = model(x), model.state_dict()
    report = sao_prune.compact(copy.deepcopy(model), example_input=x, exclude=["blocks.4*"])
    texts = {r.name: r.execution for r in report.skipped if r.execution}
    assert texts["conv_stem"] == texts["blocks.3.0.conv_dw"] == "dense + norm + activation"
    assert not any(name.startswith("blocks.4") for name in texts)
    assert "runs as dense + norm" in str(report)
    compact = copy.deepcopy(model)
    report = sao_prune.compact(compact, example_input=x)
    assert type(compact.conv_stem) is NormedConv2d
    assert_all_close([compact(x)], [expected])
    assert compact.state_dict()["conv_stem.weight"].equal(state["conv_stem.weight"])
    # Again, by the plan, and as a checkpoint.
    plan = Plan.from_json(report.plan.to_json())
    again = copy.deepcopy(model)
    sao_prune.compact(again, example_input=x, plan=plan)
    assert [type(m) for m in owners(again)] == [type(m) for m in owners(compact)]
    with pytest.raises(ValueError, match="compact already"):
        sao_prune.compact(again, example_input=x)
    assert type(again.conv_stem) is NormedConv2d
    sao_prune.expand(again)
    assert not any(isinstance(m, NormedConv2d) for m in again.modules())
    assert_all_close([again(x)], [expected])


@needs_compiler
def test_checkpoints_bring_them_back(tmp_path):
    model, x = _model()
    compact = copy.deepcopy(model)
    sao_prune.compact(compact, example_input=x)
    sao_prune.save(compact, tmp_path / "model.safetensors")
    fresh, _ = _model()
    sao_prune.load(fresh, tmp_path / "model.safetensors")
    assert plan_of(fresh).choices == plan_of(compact).choices
    assert type(fresh.conv_stem) is NormedConv2d
    assert_all_close([fresh(x)], [model(x)])
    carry_out(fresh, Plan({}))
    assert type(fresh.conv_stem) is nn.Conv2d


@needs_compiler
def test_one_value_a_channel_has_no_variance():
    for first in (nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)):
        net = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        whole = first.in_channels == 8
        sao_prune.apply(net, groups=4, seed=0, skip_first=not whole, skip_last=False)
        sao_prune.compact(net, example_input=torch.randn(2, first.in_channels, 8, 8))
        assert [m.epilogue is not None for m in owners(net)] == [True, True]
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            net.train()(torch.randn(1, first.in_channels, 2, 2))
        assert all(v.equal(before[k]) for k, v in net.state_dict().items())


def test_one_average_alone_is_refused():
    z, gain, offset, mean, variance = _operands((2, 4, 3, 3), "rows", True, True)
    for averages in ((mean, None), (None, variance)):
        with pytest.raises(RuntimeError, match="mean and variance"):
            batch_norm(z, gain, offset, *averages, "relu", 1e-5)


def _three(act: nn.Module, first: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    )
    randomise(net)
    sao_prune.apply(net, groups=2, seed=0, skip_first=not first)
    return net, torch.randn(4, 3, 9, 9)


@needs_compiler
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh])
def test_traced_graphs(act):
    net, x = _three(act())
    net.eval()
    sao_prune.compact(net, example_input=x)
    assert type(net[0]) is NormedConv2d
    expected = net(x)
    graph = torch.fx.symbolic_trace(net)
    for traced in (graph, copy.deepcopy(graph)):
        assert_all_close([traced(x)], [expected], 1e-5)
        assert_all_close([net(x)], [expected], 1e-5)


@needs_compiler
@pytest.mark.parametrize("change", ["no tracking", "no averages"])
def test_norms_that_change_afterwards(change):
    net, x = _three(nn.SiLU())
    dense = copy.deepcopy(net)
    sao_prune.compact(net, example_input=x)
    assert [m.epilogue is not None for m in owners(net)] == [True, True]
    for model in (net, dense):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.track_running_stats = False
                if change == "no averages":
                    m.running_mean = m.running_var = None
    for training in (True, False):
        found = []
        for model in (net, dense):
            with torch.no_grad():
                found.append([model.train(training)(x), *(b for m in (model[1], model[4]) for b in m.buffers())])
        assert_all_close(*found)


@needs_compiler
def test_owners_whose_class_others_change():
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    net, x = _three(nn.SiLU())
    sao_prune.compact(net, example_input=x)
    parametrize.register_parametrization(net[0], "weight", Twice())
    expected = net.eval()(x)
    sao_prune.expand(net)
    assert_all_close([net(x)], [expected])
    net, x = _three(nn.SiLU())
    net[2].plain_class = "something of its owner's"
    sao_prune.compact(net, example_input=x)


@needs_compiler
def test_owners_become_compact_themselves(tmp_path):
    net, x = _three(nn.SiLU())
    sao_prune.compact(net, example_input=x)
    other, _ = _three(nn.SiLU(), first=True)
    sao_prune.compact(other.eval(), example_input=x)
    sao_prune.save(other, tmp_path / "other.safetensors")
    assert type(net[0]) is NormedConv2d
    sao_prune.load(net.eval(), tmp_path / "other.safetensors")
    assert type(net[0]) is BlockConv2d
    assert_all_close([net(x)], [other(x)])
    sao_prune.expand(net)
    assert_all_close([net(x)], [other(x)])
    assert type(net[0]) is nn.Conv2d
    assert not {"epilogue", "whole"} & net[0].__dict__.keys()


@needs_compiler
def test_layers_left_out_stay_so_with_a_plan():
    net, x = _three(nn.SiLU())
    report = sao_prune.compact(copy.deepcopy(net), example_input=x)
    sao_prune.compact(net, example_input=x, plan=report.plan, exclude=["0"])
    assert type(net[0]) is nn.Conv2d


@needs_compiler
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, {"kernel_size": 3, "padding": 1}),
        (1, {"kernel_size": 3, "bias": False}),
        (3, {"kernel_size": 7, "stride": 2, "padding": 3}),
        (4, {"kernel_size": (5, 2), "stride": (1, 3), "padding": (0, 2)}),
        (3, {"kernel_size": 3, "dilation": (1, 2), "padding": "same"}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
        (4, {"kernel_size": 4, "stride": 5, "groups": 2}),
        (5, {"kernel_size": 3}),
    ],
)
def test_first_layers_of_any_kind(channels, options):
    """Whether torch or the kernels, as a block, compute a convolution: results, averages and gradients are torch's."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, **options), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    )
    sao_prune.apply(net, groups=2, seed=0)
    dense, x = copy.deepcopy(net), torch.randn(3, channels, 17, 18, requires_grad=True)
    sao_prune.compact(net, example_input=x.detach())
    assert type(net[0]) is NormedConv2d
    for training in (True, False):
        found = []
        for model in (net.train(training), dense.train(training)):
            y = model(x)
            leaves = [x, *model[0].parameters(), *model[1].parameters()]
            gradients = torch.autograd.grad(y.square().sum(), leaves)
            found.append([y, *gradients, model[1].running_mean, model[1].running_var])
        assert_all_close(*found)  # the bias of the first has none but rounding
        with torch.no_grad():
            assert_all_close([net(x)], [dense(x)], 1e-5)
    torch.compiler.reset()  # programs of earlier tests count, of which there may be eight
    compiled = torch.compile(net.train(), fullgraph=True, backend="aot_eager")
    assert_all_close([compiled(x)], [dense.train()(x)], 1e-5)


@needs_compiler
@pytest.mark.parametrize("options", [{"stride": [1]}, {"padding": [2], "dilation": 2}, {"padding": "same"}])
def test_options_of_first_layers_that_are_changed_later(options):
    net, x = _three(nn.ReLU())
    dense = copy.deepcopy(net)
    sao_prune.compact(net, example_input=x)
    for model in (net, dense):
        vars(model[0]).update(options)
        model.train()
    assert_all_close([net(x)], [dense(x)])
    with torch.no_grad():
        assert_all_close([net.eval()(x)], [dense.eval()(x)])


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["one channel", "a larger kernel", "double precision", "frozen"])
def test_first_weights_that_are_replaced(change, training):
    net, x = _three(nn.ReLU())
    dense = copy.deepcopy(net)
    sao_prune.compact(net, example_input=x)
    found = []
    for model in (net.train(training), dense.train(training)):
        weight = model[0].weight.detach().clone(memory_format=torch.preserve_format)
        weight = weight.sum(1, keepdim=True) if change == "one channel" else weight
        weight = F.pad(weight, (1, 1, 1, 1)) if change == "a larger kernel" else weight
        weight = weight.double() if change == "double precision" else weight
        model[0].weight = nn.Parameter(weight, requires_grad=change != "frozen")
        try:
            y = model(x[:, : weight.shape[1]])
        except RuntimeError:
            found.append(None)
            continue
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for m in (model[0], model[1]) for p in m.parameters() if p.requires_grad)])
    assert (found[0] is None) == (found[1] is None) == (change == "double precision")
    if found[0] is not None:
        assert_all_close(*found)


@needs_compiler
def test_images_of_other_channels_are_refused_as_by_torch():
    net, x = _three(nn.ReLU())
    dense = copy.deepcopy(net)
    sao_prune.compact(net, example_input=x)
    messages = []
    for model in (net, dense):
        with pytest.raises(RuntimeError) as error:
            model(torch.randn(2, 5, 9, 9))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
def test_first_weights_are_computed_once(training):
    class Counting(nn.Module):
        calls = 0

        def forward(self, w: Tensor) -> Tensor:
            self.calls += 1
            return w.clone()

    net, x = _three(nn.ReLU())
    sao_prune.compact(net, example_input=x)
    counting = Counting()
    parametrize.register_parametrization(net[0], "weight", counting)
    for gradients in (True, False):
        counting.calls = 0
        with torch.set_grad_enabled(gradients):
            net.train(training)(x)
        assert counting.calls == 1
