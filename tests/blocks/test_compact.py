"""The verbs: which layers become compact, that nothing else changes, and what is said about the others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import BlockConv2d, BlockLinear, BlockModule, Execution


def _mlp(width: int = 32, depth: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


CASES = {"mlp": (_mlp, (7, 32)), "cnn": (_cnn, (2, 3, 12, 12))}


def _layers(model: nn.Module) -> list[BlockModule]:
    return [m for m in model.modules() if isinstance(m, BlockModule)]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
@pytest.mark.parametrize("form", ["masked", "baked", "start"])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_stay(kind, topology, form, training):
    make, shape = CASES[kind]
    reference = make().double().train(training)
    method = sao_prune.SAO(topology=topology)
    start = copy.deepcopy(reference)
    sao_prune.apply(reference, groups=4, method=method, seed=1)
    if form == "start":
        model = start
        sao_prune.apply(model, groups=4, method=method, seed=1, form="compact")
    else:
        model = copy.deepcopy(reference)
        if form == "baked":
            sao_prune.remove(model)
        sao_prune.compact(model)
    assert len(_layers(model)) == sum(layer.pruned for layer in sao_prune.report(reference).layers)
    x = torch.randn(shape, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(ours).square().sum().backward()
    reference(theirs).square().sum().backward()
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(ours.grad, theirs.grad)
    sao_prune.expand(model, "masked")
    for mine, other in zip(model.modules(), reference.modules()):
        if hasattr(other, "weight_mask"):
            torch.testing.assert_close(mine.weight_orig * mine.weight_mask, other.weight_orig * other.weight_mask)


@pytest.mark.parametrize("kind", CASES)
def test_training_is_the_same_step_by_step(kind):
    make, shape = CASES[kind]
    masked = make().double()
    sao_prune.apply(masked, groups=4, seed=1)
    compact = copy.deepcopy(masked)
    sao_prune.compact(compact)
    x = torch.randn(shape, dtype=torch.float64)
    for model in (masked, compact):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(compact(x), masked(x))


@pytest.mark.parametrize("kind", CASES)
def test_expand_undoes_compact(kind):
    make, shape = CASES[kind]
    for prepare in (lambda m: None, sao_prune.remove):
        model = make().eval()
        sao_prune.apply(model, groups=4, seed=1)
        prepare(model)
        before, x = copy.deepcopy(model.state_dict()), torch.randn(shape)
        y, structure = model(x), str(model)
        sao_prune.compact(model, example_input=x)
        assert model(x).allclose(y, atol=1e-5)
        sao_prune.expand(model)
        after = model.state_dict()
        assert str(model) == structure
        assert set(after) == set(before)
        for key, value in before.items():
            if key.endswith("_orig"):
                mask = before[key.replace("_orig", "_mask")]
                assert torch.equal(after[key], value * mask)
            else:
                assert torch.equal(after[key], value)


def test_layers_share_nothing_with_references_lost():
    """A list elsewhere that holds the layers sees the compact ones: they are converted in place."""
    model = _mlp()
    held = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.compact(model)
    assert [type(m).__name__ for m in held] == ["Linear", *["BlockLinear"] * 4, "Linear"]
    layer = nn.Linear(8, 8)
    sao_prune.prune.sao(layer, groups=2, seed=0)
    sao_prune.compact(layer)
    assert isinstance(layer, BlockLinear)


def test_report_says_why_layers_are_left():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.own, self.hooked = nn.Linear(16, 16), Own(16, 16), nn.Linear(16, 16)
            self.irregular, self.dense, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2)
            self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

        def forward(self, x):
            for layer in (self.good, self.own, self.hooked, self.irregular, self.dense, self.normed):
                x = layer(x)
            return self.attention(x, x, x)[0] + self.unused.weight.sum()

    model = Model().eval()
    for name in ("good", "own", "hooked", "unused"):
        sao_prune.prune.sao(getattr(model, name), groups=4, seed=0)
    sao_prune.prune.sao(model.attention.out_proj, groups=4, seed=0)
    sao_prune.prune.kernel_random(model.irregular, amount=0.5, seed=0)

    def notice(module, inputs):
        pass

    model.hooked.register_forward_pre_hook(notice)
    x = torch.randn(3, 16)
    y = model(x)
    report = sao_prune.compact(model, example_input=x)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["good"] is None
    assert "forward of its own" in reasons["own"]
    assert "notice" in reasons["hooked"]
    assert "complete blocks" in reasons["irregular"]
    assert "nothing in it is pruned" in reasons["dense"]
    assert "does not call it" in reasons["unused"]
    assert reasons["attention.out_proj"] is None
    assert "parametrized" in reasons["normed"]
    assert "2 merged" in str(Execution(merge=2))
    assert "good" in str(report)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    ("layer", "dead", "reason"),
    [
        (nn.Conv2d(16, 16, 3, padding=1, groups=16), (5,), "no smaller: 60 kernels for 16"),
        (nn.Conv2d(16, 16, 3, padding=1), (slice(None), 5), "no smaller: 256 kernels for 256"),
        (nn.Conv2d(16, 16, 3, padding=1, groups=2), (3,), "no smaller: 128 kernels for 128"),
        (nn.Conv1d(16, 16, 1), (5,), "no smaller: 256 kernels for 256"),
    ],
)
def test_dead_channels_of_dense_layers_make_no_blocks(layer, dead, reason):
    """A channel that training has put to zero, and padding that would make the rest larger than it was."""
    wide, convolution = copy.deepcopy(layer), type(layer)
    with torch.no_grad():
        wide.weight[dead] = 0
    net = nn.Sequential(convolution(16, 16, 1), wide, convolution(16, 16, 1))
    sao_prune.prune.sao(net[0], groups=4, seed=0)
    reasons = {layer.name: layer.reason for layer in sao_prune.compact(net).layers}
    assert reasons["0"] is None
    assert reason in reasons["1"]


def test_nothing_to_compact_names_the_reasons_and_changes_nothing():
    model = _mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="0: dense: nothing in it is pruned"):
        sao_prune.compact(model)
    sao_prune.apply(model, sparsity=0.5, method="lmp")
    with pytest.raises(ValueError, match="complete blocks"):
        sao_prune.compact(model)
    assert all(torch.equal(model.state_dict().get(k, v), v) for k, v in state.items())
    with pytest.raises(ValueError, match="nothing to expand"):
        sao_prune.expand(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sao_prune.compact([model])
    with pytest.raises(ValueError, match="example_input"):
        sao_prune.compact(model, tune="train")
    with pytest.raises(ValueError, match="'train', 'infer' or None"):
        sao_prune.compact(model, tune="fast")


def test_mask_inside_kernels_is_refused():
    conv = nn.Conv2d(8, 8, 3)
    mask = torch.ones(8, 8, 3, 3)
    mask[:, :, 0] = 0
    torch.nn.utils.prune.custom_from_mask(conv, "weight", mask)
    with pytest.raises(ValueError, match="inside kernels"):
        sao_prune.compact(conv)


def test_a_failed_verification_restores_the_model():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = _mlp(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) + self.calls

    model = Fickle()
    sao_prune.apply(model, groups=4, seed=0)
    state, kinds = dict(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="differs from the original's"):
        sao_prune.compact(model, example_input=torch.randn(2, 32))
    assert [type(m) for m in model.modules()] == kinds
    assert all(model.state_dict()[k] is v or torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert list(model.state_dict()) == list(state)


def test_a_failed_verification_leaves_older_block_layers_right():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3))), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) + self.calls

    model, x = Fickle(), torch.randn(2, 16, 9, 9)
    sao_prune.apply(model.net, method=sao_prune.SAO(topology="ramanujan"), groups=4, skip_first=False, seed=0)
    sao_prune.compact(model.net[0])
    y = model.net(x)
    with pytest.raises(ValueError, match="differs from the original's"):
        sao_prune.compact(model, example_input=x)
    torch.testing.assert_close(model.net(x), y, rtol=0, atol=1e-5)


def test_half_compact_model_is_finished():
    model = _mlp()
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.compact(model[2])
    report = sao_prune.compact(model)
    assert {layer.reason for layer in report.skipped} == {"dense: nothing in it is pruned", "compact already"}
    assert len(_layers(model)) == 4


@pytest.mark.parametrize("tune", ["train", "infer"])
@pytest.mark.parametrize("kind", CASES)
def test_tuning_measures_and_keeps_outputs(kind, tune):
    make, shape = CASES[kind]
    model, x = make().eval(), torch.randn(shape)
    sao_prune.apply(model, groups=4, seed=0)
    y = model(x)
    report = sao_prune.compact(model, example_input=x, tune=tune)
    assert all(layer.ratio for layer in report.layers if layer.groups)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)


def test_tuning_needs_no_backward_in_eval_mode():
    class OnlyInTraining(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("backward can only be called in training mode")

    class Net(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y if self.training else OnlyInTraining.apply(y)

    model = Net(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=0)
    assert sao_prune.compact(model, example_input=torch.randn(2, 16, 8, 8), tune="train").layers


def test_torch_prune_masks_are_read_too():
    layer = nn.Linear(6, 6)
    torch.nn.utils.prune.custom_from_mask(layer, "weight", sao_prune.topology.interleaved(6, 6, 3).mask())
    x = torch.randn(2, 6)
    y = layer(x)
    sao_prune.compact(layer)
    assert layer.blocks.shape == (3, 2, 2)
    torch.testing.assert_close(layer(x), y)


def test_meta_model_never_holds_a_dense_weight():
    with torch.device("meta"):
        model, cnn = _mlp(), _cnn()
    sao_prune.apply(model, groups=4, seed=0, form="compact")
    sao_prune.apply(cnn, groups=4, seed=0, form="compact")
    assert model(torch.randn(2, 32)).isfinite().all()
    assert cnn(torch.randn(2, 3, 12, 12)).isfinite().all()
    assert isinstance(cnn[3], BlockConv2d)
    with torch.device("meta"):
        tokens = nn.TransformerEncoderLayer(16, 2)
        tokens.token = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="meta device"):
        sao_prune.apply(tokens, groups=2, form="compact", skip_first=False, skip_last=False)
    with pytest.raises(ValueError, match="no blocks"):
        sao_prune.apply(_mlp(), sparsity=0.5, method="lmp", form="compact")


@pytest.mark.parametrize("fuse", [True, False])
def test_compact_models_compute_shapes_on_the_meta_device(fuse):
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2)]
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 16))
    sao_prune.apply(net, groups=2, seed=0, skip_last=False)
    x = torch.randn(2, 3, 8, 8)
    sao_prune.compact(net, example_input=x, fuse=fuse)
    net.to("meta")
    assert net(x.to("meta")).shape == (2, 16)
    net(x.to("meta")).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in net.parameters())
