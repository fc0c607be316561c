"""An epilogue is found and joins its layer's kernel, and whoever looks gets the right numbers or an error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d, HardSwish
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sao_prune
from sao_prune.blocks import BlockConv2d, BlockLinear, Plan
from sao_prune.blocks.epilogue import detach
from sao_prune.blocks.plan import carry_out, plan_of
from sao_prune.topology import interleaved

from .cases import NATIVE, assert_all_close, block_layers, fuse, needs_compiler, owners, randomise

pytestmark = needs_compiler


def _images() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(BlockConv2d(interleaved(16, 16, 4), 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return _made(net, torch.randn(4, 16, 9, 9))


def _tokens(dropout: float = 0.0) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.LayerNorm(16), BlockLinear(interleaved(48, 16, 4)), nn.GELU(), nn.Dropout(dropout),
        BlockLinear(interleaved(16, 48, 4)),
    )  # fmt: skip
    return _made(net, torch.randn(3, 7, 16))


def _made(net: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    randomise(net)
    return fuse(net, x), x


def _plain(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    detach(net)
    for layer in block_layers(net):
        layer.run_as(NATIVE)
    return net


def _names(net: nn.Module) -> list[tuple[str, ...]]:
    return [() if m.epilogue is None else m.epilogue.names for m in owners(net)]


def _step(net: nn.Module, x: Tensor, run=None) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    net.zero_grad()
    y = (run or net)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


def _images_of_timm() -> tuple[nn.Module, Tensor]:
    first, second = (BlockConv2d(interleaved(16, 16, 4), 3, padding=1) for _ in range(2))
    norms = BatchNormAct2d(16, act_layer=nn.SiLU), BatchNormAct2d(16, apply_act=False)
    return _made(nn.Sequential(first, norms[0], second, norms[1], nn.ReLU()), torch.randn(4, 16, 9, 9))


def _stack() -> tuple[nn.Module, Tensor]:
    layers = [
        BlockLinear(interleaved(m, n, 4), bias=bias) for m, n, bias in ((24, 16, True), (16, 24, False), (8, 16, 1))
    ]
    return _made(nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.ReLU(), layers[2]), torch.randn(5, 16))


def _dense() -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(16, 12, 3, stride=2, padding=1, padding_mode="circular")
    return _made(nn.Sequential(conv, nn.BatchNorm2d(12), nn.ReLU()), torch.randn(4, 16, 9, 9))


CASES = pytest.mark.parametrize("make", [_images, _tokens, _images_of_timm, _stack, _dense])


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BlockLinear(interleaved(16, 16, 4)) for _ in range(10))
        self.acts = nn.ModuleList(nn.GELU() for _ in range(10))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> list[Tensor]:
        a, acts = self.layers, self.acts
        residual = a[0](x)  # read by an addition too
        kept = self.kept = a[1](x)  # put aside
        hidden = acts[2](a[3](x))  # taken by two layers
        shared = acts[3](a[6](x)) + acts[3](a[7](x))  # an activation of two layers
        twice = acts[4](a[8](acts[4](a[8](x))))  # a layer that is called twice
        found = [residual + acts[0](residual), acts[1](kept), a[4](hidden) + a[5](hidden), shared, twice]
        return [*found, acts[5](a[9](x))]


def test_chains_are_found_only_where_nobody_else_looks():
    x = torch.randn(5, 16)
    net, _ = _made(_Branches(), x)
    net.kept = None
    assert _names(net) == [(), (), (), ("gelu",), (), (), (), (), (), ("gelu",)]
    plain = _plain(net)
    assert_all_close(net(x), plain(x))
    assert _names(_images()[0]) == [("batch_norm", "relu")]
    assert _names(_tokens()[0]) == [("gelu", "linear"), ()]
    assert _names(_dense()[0]) == [("batch_norm", "relu")]


class _Backwards(nn.Module):
    """Layers that run in the reverse order of their registration, some with another activation."""

    def __init__(self, depth: int, other: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.acts = nn.ModuleList(nn.GELU() if i in other else nn.Tanh() for i in range(depth))
        self.layers = nn.ModuleList(BlockLinear(interleaved(16, 16, 4)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for i in reversed(range(len(self.layers))):
            x = self.acts[i](self.layers[i](x))
        return x


@pytest.mark.parametrize(
    ("depth", "other", "lengths"),
    [(1, (), [1]), (2, (), [2]), (9, (), [8, 1]), (19, (), [8, 8, 3]), (7, (3,), [3, 1, 3]), (4, (0,), [3, 1])],
)
def test_layers_in_a_row_run_in_one_call(depth, other, lengths):
    net, x = _made(_Backwards(depth, other), torch.randn(3, 16))
    found = [(len(names) + 1) // 2 for names in reversed(_names(net)) if names]
    assert found == lengths
    plain = _plain(net)
    for _ in range(2):
        assert_all_close(_step(net, x), _step(plain, x))
    names, plan = _names(net), Plan.from_json(plan_of(net).to_json())
    carry_out(plain, plan)
    assert _names(plain) == names


@CASES
@pytest.mark.parametrize("training", [True, False])
def test_numbers_gradients_and_averages(make, training):
    net, x = make()
    net.train(training)
    plain = _plain(net)
    for _ in range(2):
        assert_all_close(_step(net, x), _step(plain, x))
    assert list(net.state_dict()) == list(plain.state_dict())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, expected = net.eval()(x), plain.eval()(x)
        assert type(y) is Tensor
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@CASES
def test_second_derivatives(make):
    net, x = make()
    found = []
    for model in (net, _plain(net)):
        start = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(start).sin().sum(), start, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [start, *model.parameters()], allow_unused=True))
    scale = max(float(t.abs().max()) for t in found[1] if t is not None)
    for one, other in zip(*found):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * scale)


def _dual(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(net(forward_ad.make_dual(x, x + 1))))


TRANSFORMS = {
    "vmap": lambda net, x: torch.func.vmap(net)(x[:, None])[:, 0],
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x + 1,)),
    "grad": lambda net, x: torch.func.grad(lambda x: net(x).square().sum())(x),
    "gradients of samples": lambda net, x: torch.func.vmap(torch.func.grad(lambda x: net(x[None]).square().sum()))(x),
    "hessian": lambda net, x: torch.func.jvp(torch.func.grad(lambda x: net(x).square().sum()), (x,), (x + 1,)),
    "dual numbers": _dual,
}


@CASES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_after_ordinary_passes(make, transform):
    """Owners run alone there, and what they absorbed computes itself, whatever was computed together before."""
    net, x = make()
    net.eval()
    expected = TRANSFORMS[transform](_plain(net), x)
    net(x)
    assert_all_close(tree_leaves(TRANSFORMS[transform](net, x)), tree_leaves(expected))
    torch.testing.assert_close(net(x), _plain(net)(x))


@CASES
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "global"])
def test_hooks_see_what_they_would_see(make, kind):
    for where in range(len(make()[0])):
        net, x = make()
        found = []
        for model in (_plain(net), net):
            seen: list[Tensor] = []

            def note(module, args, *_, seen=seen) -> None:
                seen.append(args[0].detach().clone())

            if kind == "global":
                handle = nn.modules.module.register_module_forward_hook(note)
            else:
                names = {"forward": "forward_hook", "pre": "forward_pre_hook", "backward": "full_backward_hook"}
                handle = getattr(model[where], f"register_{names[kind]}")(note)
            result = _step(model.eval(), x)
            handle.remove()
            found.append(([s for s in seen if kind != "global" or s.dim() > 1], result))
        assert_all_close(found[1][0], found[0][0], 2e-2)
        assert_all_close(found[1][1], found[0][1])


@CASES
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "average"])
def test_copies_have_modules_of_their_own(make, how):
    net, x = make()
    net.eval()
    expected = net(x)
    twin = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda n: pickle.loads(pickle.dumps(n)),
        "average": lambda n: torch.optim.swa_utils.AveragedModel(n).module,
    }[how](net)
    assert _names(twin) == _names(net)
    mine, theirs = (owners(n)[0].epilogue.members() for n in (net, twin))
    assert not {id(m) for m in mine if m is not None} & {id(m) for m in theirs if m is not None}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("end", [1, 2, 3])
def test_checkpoints_that_end_in_between(reentrant, end):
    net, x = _images()
    net.eval()
    run = lambda t: net[end:](checkpoint(net[:end], t * 1, use_reentrant=reentrant))  # noqa: E731
    assert_all_close(_step(net, x, run), _step(_plain(net), x))


@CASES
def test_autocast_runs_unfused(make):
    net, x = make()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net.eval()(x), _plain(net).eval()(x)
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)


def test_replaced_modules():
    net, x = _images()
    net[2] = nn.Tanh()
    assert float(net.eval()(x).detach().min()) < 0
    torch.testing.assert_close(net(x), _plain(net)(x), rtol=1e-3, atol=1e-3)
    net, x = _images()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    assert type(converted[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x), _plain(_images()[0]).eval()(x), rtol=1e-3, atol=1e-3)


def test_a_model_that_runs_otherwise_is_told():
    net, x = _images()
    with pytest.raises(RuntimeError, match="Make it compact anew"):
        net[1](net[0](x) + 1)


def test_dropout_that_drops_comes_between():
    net, x = _tokens(0.5)
    results = []
    for model in (net, _plain(net)):
        torch.manual_seed(3)
        results.append(model.train()(x))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_expand_gives_the_very_classes_back():
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.SiLU())
    kinds, x = [type(m) for m in net], torch.randn(2, 16, 8, 8)
    sao_prune.apply(net, groups=4, seed=0, skip_first=False, skip_last=False)
    sao_prune.compact(net, example_input=x)
    assert _names(net)
    carry_out(net, Plan({}))
    assert [type(m) for m in net[1:3]] == kinds[1:3]
    sao_prune.expand(net)
    assert [type(m) for m in net] == kinds
    assert not any({"epilogue", "absorbed"} & vars(m).keys() for m in net.modules())


def test_norms_of_timm_that_are_something_else_run_themselves():
    net, x = _images_of_timm()
    assert _names(net) == [("batch_norm", "silu"), ("batch_norm", "relu")]
    expected = _step(_plain(net), x)
    assert_all_close(_step(net, x), expected)
    assert net[1].drop(x) is x
    for change in ({"act": HardSwish()}, {"drop": nn.Dropout(0.9)}):
        changed = copy.deepcopy(net)
        for name, module in change.items():
            setattr(changed[1], name, module)
        changed.eval()
        torch.testing.assert_close(changed(x), _plain(changed)(x), rtol=1e-4, atol=1e-5)
    other = nn.Sequential(BlockConv2d(interleaved(16, 16, 4), 3, padding=1), BatchNormAct2d(16, act_layer=HardSwish))
    other, x = _made(other, x)
    assert _names(other) == [()]


@needs_compiler
def test_attributes_of_a_model_by_the_same_names_stay():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(8, 8, 1))
    sao_prune.apply(net, groups=2, seed=0)
    own = {"whole": True, "absorbed": "nothing", "epilogue": 3.0}
    for module in (net, net[6]):
        module.__dict__.update(own)
    sao_prune.compact(net, example_input=torch.randn(2, 3, 8, 8))
    assert net[3].epilogue is not None
    sao_prune.expand(net)
    for module in (net, net[6]):
        assert {name: module.__dict__.get(name) for name in own} == own
