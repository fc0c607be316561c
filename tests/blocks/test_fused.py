"""What follows a layer is found and joins its kernel, and nobody can tell that results are put off."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sao_prune
from sao_prune.blocks import BlockConv2d, BlockLinear, BlockModule, Execution, convert, tune
from sao_prune.blocks.deferred import Deferred, TooLate, strides_of
from sao_prune.blocks.follow import followers
from sao_prune.blocks.native import build
from sao_prune.topology import interleaved

from .cases import fuse, randomise

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler that the kernels can be built with")


def _fused(net: nn.Module, x: Tensor) -> nn.Module:
    randomise(net)
    for module in net.modules():
        if isinstance(module, BlockModule):
            module.run_as(Execution(native=True))
    fuse(net, x)
    return net


def _small() -> tuple[nn.Sequential, Tensor]:
    x = torch.randn(4, 16, 9, 9)
    net = nn.Sequential(BlockConv2d(interleaved(16, 16, 4), 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return _fused(net, x), x


def test_what_follows_is_found():
    x = torch.randn(2, 16, 9, 9)
    net, _ = _small()
    assert net[0].execution.fused == ("batch_norm", "relu")
    assert net[0].followers == (net[1], net[2])
    assert str(net[0].execution) == "blocks, native + batch_norm + relu"

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(BlockConv2d(interleaved(16, 16, 4), 1) for _ in range(7))
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> list[Tensor]:
            twice = self.layers[0](x)
            functional = F.silu(self.norm(self.layers[1](x)))
            shared = F.relu(self.layers[2](x)) + torch.tanh(self.layers[2](x))
            normed = self.norm(self.layers[3](x))
            returned = self.layers[4](x)
            other = F.softplus(self.layers[5](x))
            return [twice + F.relu(twice), functional, shared, normed + F.gelu(normed), returned, F.relu(returned),
                    other, F.relu(F.relu(self.layers[6](x)))]  # fmt: skip

    net = _fused(Branches(), x)
    assert [layer.execution.fused for layer in net.layers] == [
        (), ("batch_norm", "silu"), (), ("batch_norm",), (), (), ("relu",)
    ]  # fmt: skip
    assert net.layers[1].followers == (net.norm,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_model_gives_ordinary_tensors(training, mode):
    net, x = _small()
    plain = copy.deepcopy(net)
    plain[0].run_as(Execution(native=True))
    for model in (net, plain):
        model.train(training)
    with mode():
        y, expected = net(x), plain(x)
    assert type(y) is Tensor
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.requires_grad == expected.requires_grad
    for one, other in zip(net.buffers(), plain.buffers()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_anything_else_is_done_with_the_layers_own_result():
    net, x = _small()
    layer, norm, act = net
    plain = copy.deepcopy(layer)
    plain.run_as(Execution(native=True))
    put_off = layer(x)
    assert type(put_off) is Deferred
    assert put_off.shape == (4, 16, 9, 9)
    assert put_off.is_contiguous()
    assert put_off.requires_grad
    assert put_off.dtype is torch.float32
    expected = plain(x)
    torch.testing.assert_close(put_off + 0, expected)
    torch.testing.assert_close(norm(put_off), norm(expected))
    torch.testing.assert_close(torch.cat([layer(x), x]), torch.cat([expected, x]))
    torch.testing.assert_close(F.softplus(layer(x)), F.softplus(expected))
    torch.testing.assert_close(act(layer(x)), F.relu(expected))  # not the norm that was expected
    assert layer(x).tolist()[0][0] == expected.tolist()[0][0]
    assert layer(x).grad_fn is not None
    assert type(copy.deepcopy(layer(x).detach())) is Tensor
    partly = norm(layer(x))
    assert type(partly) is Deferred
    torch.testing.assert_close(partly.mean(), norm(expected).mean())
    with torch.no_grad():
        seen = (watched := layer(x)).abs().mean()
    assert not seen.requires_grad
    assert norm(watched).requires_grad


def test_in_place_changes_what_it_is_given():
    net = _fused(nn.Sequential(BlockLinear(interleaved(8, 8, 2)), nn.ReLU(inplace=True)), torch.randn(3, 8))
    x = torch.randn(3, 8)
    result = net[0](x)
    F.relu(result, inplace=True)
    assert float(result.min()) == 0
    result = net[0](x)
    result.relu_()
    assert float((result + 0).min()) == 0


def test_gradients_reach_everything():
    net, x = _small()
    plain = copy.deepcopy(net)
    plain[0].run_as(Execution(native=True))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradient = torch.randn(4, 16, 9, 9)
    net(mine).backward(gradient)
    plain(theirs).backward(gradient)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    for one, other in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=2e-3)
    again = x.clone().requires_grad_()
    checkpoint(net, again, use_reentrant=False).backward(gradient)
    torch.testing.assert_close(again.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training):
    net = nn.Sequential(BlockConv2d(interleaved(8, 8, 2), 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())
    x = torch.randn(2, 8, 5, 5)
    net = _fused(net, x).train(training)
    plain = copy.deepcopy(net)
    plain[0].run_as(Execution())
    found = []
    for model in (net, plain):
        start = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(start).pow(3).sum(), start, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [start, *model.parameters()], allow_unused=True))
    for one, other in zip(*found):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * max(1.0, float(other.abs().max())))


def test_nothing_is_put_off_while_somebody_watches():
    for where in range(3):
        net, x = _small()
        seen = []
        handle = net[where].register_forward_hook(lambda module, args, output, seen=seen: seen.append((args, output)))
        net(x)
        assert type(seen[0][1]) is Tensor
        assert type(seen[0][0][0]) is Tensor
        handle.remove()
        assert type(net[0](x)) is Deferred
    net, x = _small()
    net[1].register_full_backward_hook(lambda *_: None)
    assert type(net[0](x)) is Tensor
    net, x = _small()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert type(net[0](x)) is Tensor
    finally:
        handle.remove()


def test_too_late_is_an_error_and_never_a_wrong_number():
    net, x = _small()
    put_off = net[0](x)
    x.add_(1)
    with pytest.raises(TooLate, match="changed in place"):
        put_off.sum()
    put_off = net[0](x)
    with torch.no_grad():
        net[0].blocks.mul_(2)
    with pytest.raises(TooLate, match="changed in place"):
        net[1](put_off).sum()


def test_a_norm_in_training_counts_once_and_at_once():
    net, x = _small()
    plain = copy.deepcopy(net)
    plain[0].run_as(Execution(native=True))
    h, expected = net[1](net[0](x)), plain[1](plain[0](x))
    assert type(h) is Deferred
    for one, other in zip(net[1].buffers(), plain[1].buffers()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    y = F.relu(h)
    torch.testing.assert_close(h.mean(), expected.mean(), rtol=1e-4, atol=1e-4)
    for one, other in zip(net[1].buffers(), plain[1].buffers()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(expected)
    (y * gradient + h).sum().backward()
    (F.relu(expected) * gradient + expected).sum().backward()
    torch.testing.assert_close(net[0].blocks.grad, plain[0].blocks.grad, rtol=1e-3, atol=2e-3)


def test_averages_that_change_in_between_are_noticed():
    net, x = _small()
    h = net.eval()[1](net[0](x))
    net[1].running_mean.add_(5)
    with pytest.raises(TooLate):
        net[2](h)


def test_the_weight_of_the_call_counts():
    net, x = _small()
    h = torch.func.functional_call(net[0], {"blocks": torch.zeros_like(net[0].blocks)}, x)
    torch.testing.assert_close(h + 0, net[0].bias.view(-1, 1, 1).expand_as(h))
    expected = net[0](x) + 0
    h = net[0](x)
    net[0].blocks = nn.Parameter(torch.zeros_like(net[0].blocks))
    torch.testing.assert_close(h + 0, expected)


def test_a_place_to_write_to_is_written_to():
    net = _fused(nn.Sequential(BlockLinear(interleaved(8, 8, 2)), nn.Tanh()), torch.randn(3, 8))
    assert net[0].execution.fused == ("tanh",)
    place = torch.empty(3, 8)
    with torch.no_grad():
        assert torch.tanh(net[0](torch.ones(3, 8)), out=place) is place
        torch.testing.assert_close(place, net(torch.ones(3, 8)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_that_end_in_between(reentrant):
    net, x = _small()
    plain = copy.deepcopy(net)
    plain[0].run_as(Execution(native=True))
    found = []
    for model in (net, plain):
        start = x.clone().requires_grad_()
        model[1:](checkpoint(model[0], start * 2, use_reentrant=reentrant)).square().sum().backward()
        found.append([start.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_scripted_code_may_look_first():
    @torch.jit.script
    def peek(x: Tensor) -> Tensor:
        return x.mean()

    for net, x in (_small(), (_fused(nn.Sequential(BlockLinear(interleaved(8, 8, 2)), nn.GELU()), torch.randn(2, 3, 8)),
                              torch.randn(2, 3, 8))):  # fmt: skip
        h = net[0](x)
        torch.testing.assert_close(peek(h).detach(), (net[0](x) + 0).mean().detach(), rtol=1e-4, atol=1e-4)
        net[1:](h).square().sum().backward()
        assert net[0].blocks.grad.abs().sum() > 0
        h = net[0](x)
        with torch.inference_mode():
            h.mean()
        assert F.softplus(h).requires_grad


def test_gradients_of_what_a_kernel_has_taken_are_refused():
    net, x = _small()
    h = net[0](x)
    y = net[1:](h)
    for ask in (lambda: h.register_hook(print), h.retain_grad, lambda: torch.autograd.grad(y.sum(), h)):
        with pytest.raises(TooLate, match="no gradients of it"):
            ask()
    h = net[0](x)
    h.retain_grad()
    net[1:](h).sum().backward()
    assert h.grad is not None


def test_hooks_of_containers_see_ordinary_tensors():
    x = torch.randn(4, 16, 9, 9)

    def build() -> nn.Module:
        layer = BlockConv2d(interleaved(16, 16, 4), 3, padding=1)
        return nn.Sequential(nn.Sequential(layer), nn.Sequential(nn.BatchNorm2d(16), nn.Identity(), nn.ReLU()))

    assert type(_fused(build(), x)[0](x)) is Deferred
    for name in ("0", "1", "1.0", "1.1", "1.2"):
        net, seen = _fused(build(), x), []
        net.get_submodule(name).register_full_backward_hook(lambda *_, seen=seen: seen.append(1))
        net(x).sum().backward()
        assert seen
        net = _fused(build(), x)
        net.get_submodule(name).register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        net(x)
        assert type(seen[-1]) is Tensor


def test_tracing():
    net, x = _small()
    traced = torch.jit.trace(net.eval(), x, check_trace=False)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_result_does_not_keep_its_input():
    net, x = _small()
    given = x.clone()
    watch = weakref.ref(given)
    with torch.no_grad():
        h = net[0](given)
        h.sum()
    del given
    assert watch() is None


def test_functions_that_dispatch_does_not_see_are_told():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    net, x = _small()
    torch.testing.assert_close(Twice.apply(net[0](x)), 2 * (net[0](x) + 0))
    with pytest.raises(TooLate, match="custom autograd function"):
        Twice.apply(net[0](x)).sum().backward()


def test_exporters_compilers_and_counters_see_ordinary_operations():
    net, x = _small()
    net.eval()
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert type(net[0](x)) is Tensor
    torch.testing.assert_close(torch.func.functional_call(net, dict(net.named_parameters()), x), net(x))


def test_a_fused_model_is_copied_kept_and_expanded():
    net, x = _small()
    net.eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[0].followers == (other[1], other[2])
        assert torch.equal(other(x), net(x))
    y = net(x)
    state = net.state_dict()
    assert {name.partition(".")[0] for name in state} == {"0", "1"}
    sao_prune.expand(net)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    assert "followers" not in vars(net[0])
    fresh = copy.deepcopy(net)
    assert sao_prune.compact(fresh, example_input=x).compact


def test_tuning_tries_what_follows(monkeypatch):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1),
        nn.Flatten(), nn.Linear(8 * 36, 64), nn.GELU(), nn.Linear(64, 5),
    )  # fmt: skip
    sao_prune.apply(net, groups=4, seed=0)
    x = torch.randn(4, 3, 8, 8)
    fused: list[bool] = []

    def time_model(model, *_):
        fused.append(any(isinstance(m, BlockModule) and m.execution.fused for m in model.modules()))
        return float(not fused[-1])

    def race(runs, device):
        return {
            key: 1.0 if isinstance(key, Execution) and key.native and not key.channels_last else 2.0 for key in runs
        }

    monkeypatch.setattr(convert, "time_model", time_model)
    monkeypatch.setattr(tune, "_race", race)
    y = net.eval()(x)
    report = sao_prune.compact(net, example_input=x, tune="train")
    assert True in fused
    assert False in fused
    assert {layer.name: layer.execution for layer in report.compact}["6"].endswith("native + gelu")
    assert "native + batch_norm + relu" in {layer.name: layer.execution for layer in report.compact}["1"]
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)


def test_a_plan_whose_results_come_too_late_is_not_chosen(monkeypatch):
    monkeypatch.setattr(tune, "run_model", lambda *_: (_ for _ in ()).throw(TooLate("no")))
    assert tune.time_model(nn.Linear(2, 2), torch.ones(1, 2), "train") == float("inf")


def test_strides():
    for shape in ((2, 3, 4, 5), (7, 8), (2, 3, 4)):
        x = torch.empty(shape)
        assert strides_of(shape, len(shape) - 1) == x.stride()
        assert strides_of(shape, 1) == x.movedim(1, -1).contiguous().movedim(-1, 1).stride()


def test_what_follows_needs_a_model_that_runs():
    with pytest.raises(ValueError, match="does not run"):
        followers(nn.Linear(2, 2), [], torch.ones(1, 3))
