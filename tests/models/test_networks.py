"""The mixers and convolutional networks of the experiments: shapes and counts of the thesis's tables, timm, pruning."""

import pytest
import timm
import torch
from torch import nn

import sao_prune
from sao_prune import models
from sao_prune.models.options import ACTIVATIONS
from sao_prune.models.residual import PadShortcut

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

# Small networks of every family, with names that timm knows.
SMALL = {
    "mixer": ("sao_mixer_nano", {"depth": 2, "width": 16, "channel_width": 32, "token_width": 8, "img_size": 16}),
    "resmlp": ("sao_resmlp", {"depth": 2, "width": 16, "hidden": 32, "img_size": 16}),
    "vanilla, relu": ("sao_vanilla_cnn", {"depth": 3, "width": 8, "img_size": 16}),
    "vanilla, tanh": ("sao_vanilla_cnn", {"depth": 2, "width": 8, "activation": "tanh", "head": "conv"}),
    "vgg": ("sao_vgg16", {"width": 8}),
    "resnet": ("sao_resnet", {"depth": 8, "width": 8, "img_size": 12}),
    "resnet18": ("sao_resnet18", {"width": 8, "img_size": 16}),
    "resnet18, projections": ("sao_resnet18", {"width": 8, "img_size": 16, "shortcut": "projection"}),
    "mlp": ("sao_mlp", {"depth": 3, "width": 16, "img_size": 8}),
    "mlp with skips": ("sao_mlp", {"depth": 3, "width": 16, "img_size": 8, "skips": True}),
}
every_family = pytest.mark.parametrize("family", SMALL)


def small(family: str, **more: object) -> nn.Module:
    name, options = SMALL[family]
    torch.manual_seed(0)
    return timm.create_model(name, **{**options, **more})


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the weights of all layers, in order: outputs, inputs, kernel."""
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, LAYERS)]


def conv(out: int, into: int, k: int = 3) -> tuple[int, ...]:
    return out, into, k, k


@pytest.mark.parametrize(("depth", "trainable"), [(8, 33), (16, 65)])
def test_mixer_has_the_layers_of_table_3_6(depth: int, trainable: int) -> None:
    found = shapes(on_meta("sao_mixer_nano", depth=depth))
    block = [(64, 64, 1), (64, 64, 1), (512, 128), (128, 512)]
    assert found == [conv(128, 3, 4), *block * depth, (10, 128)]
    assert len(found) - 1 == trainable  # the thesis leaves the embedding out of its count
    weights = 4 * 4 * 3 * 128 + depth * (2 * 64 * 64 + 2 * 128 * 512) + 1280
    assert sum(torch.Size(s).numel() for s in found) == weights


def test_resmlp_has_the_layers_of_table_3_7() -> None:
    model = on_meta("sao_resmlp")
    found = shapes(model)
    assert found == [conv(48, 3, 4), *[(64, 64), (192, 48), (48, 192)] * 12, (10, 48)]
    assert len(found) == 38
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


@pytest.mark.parametrize(("depth", "width"), [(32, 128), (768, 32)])
@pytest.mark.parametrize(("head", "more"), [("pool", 0), ("conv", 2)])
def test_vanilla_cnn_has_the_layers_of_table_3_9(depth: int, width: int, head: str, more: int) -> None:
    model = on_meta("sao_vanilla_cnn", depth=depth, width=width, head=head, num_classes=100)
    convolutions = depth + 1 + more
    assert shapes(model) == [conv(width, 3), *[conv(width, width)] * (convolutions - 1), (100, width)]
    strides = [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert strides == [1, 2, *[1] * (depth - 1), *[2] * more]
    kinds = {type(m) for m in model.modules() if not list(m.children())}
    assert kinds == {nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}


def test_vgg_has_the_layers_and_sizes_of_table_3_11() -> None:
    model = on_meta("sao_vgg16")
    stages = [
        (64, 3),
        (64, 64),
        (128, 64),
        (128, 128),
        (256, 128),
        (256, 256),
        (256, 256),
        (512, 256),
        *[(512, 512)] * 5,
    ]
    linears = [(256, 512), (128, 256), (10, 128)]
    assert shapes(model) == [*(conv(m, n) for m, n in stages), *linears]
    assert sum(torch.Size(s).numel() for s in shapes(model)) == 14_875_584
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 13
    seen = []
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: seen.append(y.shape[-1]))
    features = model.forward_features(torch.empty(1, 3, 36, 36, device="meta"))
    assert seen == [36] * 2 + [18] * 2 + [9] * 6 + [3] * 3
    assert features.shape == (1, 512, 1, 1)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_cifar_resnets_have_n_weight_layers_and_the_known_parameters(depth: int, parameters: int) -> None:
    model = on_meta("sao_resnet", depth=depth)
    n = (depth - 2) // 6
    stage2 = [conv(32, 16), *[conv(32, 32)] * (2 * n - 1)]
    stage3 = [conv(64, 32), *[conv(64, 64)] * (2 * n - 1)]
    assert shapes(model) == [conv(16, 3), *[conv(16, 16)] * (2 * n), *stage2, *stage3, (10, 64)]
    assert len(shapes(model)) == depth
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.forward_features(torch.empty(1, 3, 36, 36, device="meta")).shape == (1, 64, 9, 9)


def test_resnet18_has_the_layers_of_table_3_13() -> None:
    model = on_meta("sao_resnet18")
    wide = [conv(2 * w, into) for w in (64, 128, 256) for into in (w, 2 * w, 2 * w, 2 * w)]
    assert shapes(model) == [conv(64, 3), *[conv(64, 64)] * 4, *wide, (100, 512)]
    assert len(shapes(model)) == 18
    assert model.forward_features(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 512, 4, 4)
    usual = on_meta("sao_resnet18", shortcut="projection")
    assert sum(p.numel() for p in usual.parameters()) == 11_220_132
    assert len(shapes(usual)) == 21


@pytest.mark.parametrize(
    ("depth", "degree", "millions"), [(25, 216, 2.52), (50, 108, 2.43), (100, 54, 2.38), (200, 27, 2.36)]
)
def test_mlp_of_432_has_the_parameters_of_table_4_3(depth: int, degree: int, millions: float) -> None:
    model = on_meta("sao_mlp", depth=depth, width=432, img_size=24, in_chans=3)
    assert shapes(model)[:3] == [(864, 1728), (432, 864), (432, 432)]
    plan = sao_prune.plan(model, degree=degree, skip_first=False)
    left = sum(layer.nnz for layer in plan.layers)
    assert left == (depth + 2) * 432 * degree + 4320
    assert round(left / 1e6, 2) == millions


def test_dense_mlp_of_table_4_3() -> None:
    weights = shapes(on_meta("sao_mlp", depth=4, width=432, img_size=24, in_chans=3))
    assert round(sum(torch.Size(s).numel() for s in weights) / 1e6, 2) == 2.43


@every_family
@pytest.mark.parametrize("in_chans", [1, 3])
def test_they_have_what_timm_expects_of_a_model(family: str, in_chans: int) -> None:
    model = small(family, in_chans=in_chans, num_classes=7).eval()
    x = image(model)
    assert x.shape[1] == in_chans
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.head
    features = model.forward_features(x)
    assert features.shape[0] == 2
    assert model.num_features in features.shape[1:]
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert small(family, num_classes=0).head.__class__ is nn.Identity


@every_family
def test_all_layers_but_the_first_and_the_last_are_pruned(family: str) -> None:
    model = small(family)
    names = [f"{path}.weight" for path, m in model.named_modules() if isinstance(m, LAYERS)]
    left_out = {layer.name for layer in sao_prune.plan(model, groups=2).layers if layer.groups is None}
    assert left_out == {names[0], names[-1]}
    assert names[-1] == "head.weight"


@every_family
def test_layers_are_registered_in_the_order_of_execution(family: str) -> None:
    model = small(family)
    order = [layer.name for layer in sao_prune.plan(model, groups=2).layers]
    assert order == [layer.name for layer in sao_prune.plan(model, groups=2, example_input=image(model)).layers]


@every_family
def test_compact_computes_what_the_masked_network_does(family: str) -> None:
    model = small(family)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    pruned = sao_prune.apply(model, groups=4, seed=0)
    model.double().eval()
    x = image(model).double()
    with torch.no_grad():
        expected = model(x)
        report = sao_prune.compact(model, example_input=x)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert len(report.compact) == sum(layer.groups is not None for layer in pruned.layers)


@every_family
def test_every_parameter_has_a_gradient(family: str) -> None:
    model = small(family)
    model(image(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", ["pool", "conv"])
def test_a_vanilla_classifier_sees_the_mean_over_positions(head: str) -> None:
    model = models.VanillaCNN(depth=2, width=4, head=head)
    x = image(model)
    features = model.forward_features(x)
    assert features.shape[-1] == (16 if head == "pool" else 4)
    torch.testing.assert_close(model(x), model.head(features.mean((2, 3))))
    assert isinstance(model.features[-1], nn.ReLU)


def test_pad_shortcut_subsamples_and_adds_zero_channels() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = PadShortcut(2, 4, 2)(x)
    assert y.tolist()[0] == [[[0.0] * 2] * 2, [[0.0, 2.0], [8.0, 10.0]], [[16.0, 18.0], [24.0, 26.0]], [[0.0] * 2] * 2]


def test_without_their_branches_the_residual_networks_are_the_identity() -> None:
    resmlp = small("resmlp")
    tokens = torch.randn(2, 16, 16)
    for block in resmlp.blocks:
        for scale in (block.token_scale, block.channel_scale):
            nn.init.zeros_(scale.scale)
    torch.testing.assert_close(resmlp.blocks(tokens), tokens)
    mixer = small("mixer")
    for block in mixer.blocks:
        for last in (block.token_mix[3], block.channel_mix[3]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    torch.testing.assert_close(mixer.blocks(tokens), tokens)
    resnet = small("resnet").eval()
    nn.init.zeros_(resnet.stages[0][0].bn2.weight)
    x = torch.rand(1, 8, 4, 4)
    torch.testing.assert_close(resnet.stages[0][0](x), x)


def test_tokens_see_each_other_only_through_the_token_layers() -> None:
    for family in ("mixer", "resmlp"):
        model = small(family)
        x = torch.randn(1, 16, 16, requires_grad=True)
        model.blocks[0](x)[0, 3].sum().backward()
        assert (x.grad[0].abs().sum(1) > 0).all()
        for module in model.blocks[0].token_mix.modules():
            if isinstance(module, LAYERS):
                nn.init.zeros_(module.weight)
        x.grad = None
        model.blocks[0](x)[0, 3].square().sum().backward()
        assert x.grad[0].abs().sum(1).nonzero().flatten().tolist() == [3]


def test_drop_rate_acts_in_training_only() -> None:
    for family in ("mixer", "resmlp"):
        model = small(family, drop_rate=0.5)
        x = image(model)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(("name", "last", "sizes"), [("sao_vgg16", 6, [9] * 3 + [3] * 3), ("sao_resnet", 5, [9] * 5)])
def test_images_of_36_leave_the_last_layers_exact_eco_kernels(name: str, last: int, sizes: list[int]) -> None:
    width = {"width": 4, **({"depth": 20} if name == "sao_resnet" else {})}
    model = timm.create_model(name, **width)
    report = sao_prune.nn.convert_eco(model, torch.zeros(1, 3, 36, 36), last=last, seed=0)
    assert [r.input_size for r in report.converted] == [(s, s) for s in sizes]
    assert all(r.exact for r in report.converted)


def test_activations_are_modules_of_their_own_and_not_in_place() -> None:
    for family in SMALL:
        acts = [m for m in small(family).modules() if isinstance(m, tuple(ACTIVATIONS.values()))]
        assert not any(getattr(m, "inplace", False) for m in acts)
        assert len({id(m) for m in acts}) == len(acts)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sao_mixer_nano", {"depth": 0}, "depth must be a positive integer, got 0"),
        ("sao_mixer_nano", {"img_size": 30}, "multiple of 4 .*got 30"),
        ("sao_mixer_nano", {"drop_rate": 1.0}, r"drop_rate must be a number in \[0, 1\), got 1.0"),
        ("sao_resmlp", {"width": 2.5}, "width must be a positive integer, got 2.5"),
        ("sao_resmlp", {"img_size": 33}, "multiple of 4"),
        ("sao_resmlp", {"branch_scale": 0}, "branch_scale must be positive"),
        ("sao_vanilla_cnn", {"depth": True}, "got True"),
        ("sao_vanilla_cnn", {"activation": "rely"}, "unknown activation 'rely'.*did you mean 'relu'"),
        ("sao_vanilla_cnn", {"head": "flat"}, "unknown head 'flat'; allowed: pool, conv"),
        ("sao_vanilla_cnn", {"head": "conv", "img_size": 7}, "at least 8 .*got 7"),
        ("sao_vgg16", {"img_size": 32}, "multiple of 36 .*got 32"),
        ("sao_resnet", {"depth": 18}, r"6 n \+ 2 .*got 18"),
        ("sao_resnet", {"depth": 2}, r"6 n \+ 2 .*got 2"),
        ("sao_resnet", {"img_size": 3}, "at least 4"),
        ("sao_resnet", {"blocks": (1,)}, "SaoResNet"),
        ("sao_resnet18", {"shortcut": "projections"}, "did you mean 'projection'"),
        ("sao_resnet18", {"num_classes": -1}, "num_classes must be a positive integer, or 0"),
        ("sao_mlp", {"width": 0}, "width must be a positive integer, got 0"),
        ("sao_mlp", {"widths": (3,)}, "SaoMLP"),
        *[(name, {"in_chans": 0}, "in_chans") for name in ("sao_vgg16", "sao_resnet", "sao_resmlp", "sao_mixer_nano")],
        *[(name, {"pretrained": True}, "no pretrained weights") for name in models.__all__ if name.startswith("sao_")],
    ],
)
def test_bad_options_are_refused_with_a_reason(name: str, options: dict, said: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        getattr(models, name)(**options)


def test_every_network_is_public_and_known_to_timm() -> None:
    entries = {name for name in models.__all__ if name.startswith("sao_")}
    assert entries == set(timm.list_models("sao_*"))
    assert {"sao_mixer_nano", "sao_resmlp", "sao_vanilla_cnn", "sao_vgg16", "sao_resnet", "sao_resnet18"} <= entries
    assert all(hasattr(models, name) for name in models.__all__)


def test_no_family_of_timm_has_our_networks_in_it() -> None:
    # timm files a network under the last part of its module's name.
    for entry in models.__all__:
        if entry.startswith("sao_"):
            family = timm.list_models(module=getattr(models, entry).__module__.rpartition(".")[2])
            assert all(name.startswith("sao_") for name in family)
