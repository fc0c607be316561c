"""Residual blocks start as orthogonal maps: whole chains of them, sparse, in float32."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

import sao_prune
import sao_prune.models
from sao_prune import SAO, analysis


class Block(nn.Module):
    """``relu(x + W_L relu(.. relu(W_1 x)))`` over the given widths, linear or 3 x 3."""

    def __init__(self, widths: tuple[int, ...], conv: bool) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) if conv else nn.Linear(a, b) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index, layer in enumerate(self.layers):
            h = layer(h if index == 0 else h.relu())
        return (x + h).relu()


def chain(depth: int, k: int, hidden: tuple[int, ...], conv: bool = False) -> nn.Sequential:
    """``k`` signals in, ``2 k`` mirrored channels through all blocks, ``k`` signals out."""
    layer = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if conv else nn.Linear
    blocks = (Block((2 * k, *hidden, 2 * k), conv) for _ in range(depth))
    return nn.Sequential(layer(k, 2 * k), nn.ReLU(), *blocks, layer(2 * k, k))


def isometric(model: nn.Module, example: Tensor, groups: int, **options: object) -> sao_prune.Report:
    method = SAO(residual="isometric", measure=False, **options)
    return sao_prune.apply(
        model, groups=groups, method=method, skip_first=False, skip_last=False, example_input=example, seed=3
    )


def worst(model: nn.Module, x: Tensor) -> float:
    spectrum = analysis.jacobian_spectrum(model, x, method="exact")
    return max(abs(spectrum.largest - 1), abs(spectrum.smallest - 1))


@pytest.mark.parametrize(
    ("groups", "conv", "topology"),
    [
        *((groups, conv, "ramanujan") for groups in (2, 8, 32) for conv in (False, True)),
        (8, False, "interleaved"),
    ],
)
def test_fifty_blocks_are_an_orthogonal_map(groups: int, conv: bool, topology: str) -> None:
    k = 32 if conv else 64
    x = torch.randn(1, k, *((2, 1) if conv else ()))
    model = chain(50, k, (2 * k,), conv)
    report = isometric(model, x, groups, topology=topology)
    assert {record.status for record in report.residuals} == {"exact"}
    assert len(report.residuals) == 50
    assert {layer.groups for layer in report.layers} == {groups}
    assert abs(report.sparsity - (1 - 1 / groups)) < 1e-9
    assert worst(model, x) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("conv", [False, True])
def test_two_hundred_blocks_still_are(conv: bool) -> None:
    k = 16 if conv else 64
    x = torch.randn(1, k, *((2, 2) if conv else ()))
    model = chain(200, k, (2 * k,), conv)
    isometric(model, x, 8)
    assert worst(model, x) < 1e-5


@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
@pytest.mark.parametrize("hidden", [(), (12,), (48,), (16, 16), (12, 24), (72, 72), (24, 8, 16)])
@pytest.mark.parametrize("fit", ["nearest", "exact"])
@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_any_branch_whose_widths_allow_it_is_exact(hidden: tuple[int, ...], fit: str, topology: str) -> None:
    x = torch.randn(1, 12)
    model = chain(3, 12, hidden)
    method = SAO(residual="isometric", measure=False, topology=topology)
    report = sao_prune.apply(
        model, sparsity=0.6, fit=fit, method=method, skip_first=False, skip_last=False, example_input=x, seed=0
    )
    assert [record.status for record in report.residuals] == ["exact"] * 3
    assert worst(model, x) < 1e-5


@pytest.mark.parametrize(("hidden", "why"), [((40,), "multiple"), ((48, 24), "grow"), ((23,), "odd")])
def test_hidden_widths_that_cannot_carry_evenly_are_left(hidden: tuple[int, ...], why: str) -> None:
    model = chain(1, 12, hidden)
    (record,) = isometric(model, torch.randn(1, 12), 2).residuals
    assert record.status == "left"
    assert why in record.note


@pytest.mark.parametrize("conv", [False, True])
def test_values_stay_on_the_topology_and_it_has_blocks(conv: bool) -> None:
    model = chain(3, 16, (32,), conv)
    isometric(model, torch.randn(1, 16, *((4, 4) if conv else ())), 4)
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        mask = module.weight_mask
        assert not bool(module.weight_orig[mask == 0].any())
        assert sao_prune.topology.BlockTopology.from_mask(mask.flatten(2)[..., 0] if conv else mask).groups == 4


def test_one_block_mixes_what_the_next_keeps_apart() -> None:
    """Were all blocks to share their sets of channels, the network would be several that never meet."""
    for topology in ("ramanujan", "interleaved"):
        model = chain(6, 16, (32,))
        isometric(model, torch.randn(1, 16), 4, topology=topology)
        blocks = model[2:-1]
        jacobian = torch.autograd.functional.jacobian(blocks, torch.cat([torch.ones(16), torch.zeros(16)]))
        reached = (jacobian[:16] - jacobian[16:])[:, :16] != 0
        assert bool(reached.all()), topology


def test_gradients_reach_the_kept_weights() -> None:
    """All but those from a signal's one half to a unit that carries its other: the two are never positive together."""
    model = chain(4, 16, (32,))
    isometric(model, torch.randn(1, 16), 4)
    model(torch.randn(256, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("weight_orig"):
            module = model.get_submodule(name.removesuffix(".weight_orig"))
            unreached = int(module.weight_mask.sum()) - int((parameter.grad != 0).sum())
            assert unreached <= (len(parameter) if "layers.0" in name else 0), name


@pytest.mark.parametrize("conv", [False, True])
def test_compact_and_masked_agree(conv: bool) -> None:
    x = torch.randn(5, 16, *((4, 4) if conv else ()))
    masked = chain(4, 16, (32,), conv)
    direct = copy.deepcopy(masked)
    isometric(masked, x, 4)
    expected = masked(x)
    method = SAO(residual="isometric", measure=False)
    sao_prune.apply(
        direct,
        groups=4,
        method=method,
        skip_first=False,
        skip_last=False,
        example_input=x,
        seed=3,
        form="compact",
    )
    torch.testing.assert_close(direct(x), expected, atol=1e-5, rtol=1e-5)
    sao_prune.compact(masked)
    torch.testing.assert_close(masked(x), expected, atol=1e-5, rtol=1e-5)


class Plain(nn.Module):
    """``x + W_2 f(W_1 x)`` without a norm."""

    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize("hidden", [8, 16, 64])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.Softplus()])
def test_paired_activations_make_rotations_at_any_input(hidden: int, act: nn.Module) -> None:
    model = nn.Sequential(*(Plain(16, hidden, act) for _ in range(5)))
    x = torch.randn(1, 16)
    report = isometric(model, x, 2)
    assert {record.status for record in report.residuals} == {"exact"}
    assert worst(model, 0.7 * x) < 1e-5


def test_odd_activations_make_rotations_near_zero() -> None:
    model = nn.Sequential(*(Plain(16, 24, nn.Tanh()) for _ in range(5)))
    report = isometric(model, torch.randn(1, 16), 2)
    assert {record.status for record in report.residuals} == {"near"}
    assert worst(model, torch.zeros(1, 16)) < 1e-5


def test_the_report_says_what_was_measured() -> None:
    model = timm.create_model("sao_resnet", depth=8, norm="none", img_size=8)
    method = SAO(residual="isometric", measure=True)
    report = sao_prune.apply(model, groups=4, method=method, example_input=torch.randn(2, 3, 8, 8), seed=0)
    assert [(r.name, r.status) for r in report.residuals] == [
        ("stages.0.0", "exact"),
        ("stages.1.0", "near"),
        ("stages.2.0", "near"),
        ("", "near"),
    ]
    exact = report.residuals[0]
    assert exact.after == pytest.approx((1, 1), abs=1e-5)
    assert exact.before != pytest.approx((1, 1), abs=1e-2)
    assert "exact: stages.0.0" in next(layer.note for layer in report.pruned if layer.name == "stages.0.0.conv1.weight")
    assert "stages.0.0: exact; singular values before" in str(report)


@pytest.mark.parametrize(("norm", "shortcut"), [("batch", "projection"), ("none", "projection"), ("none", "pad")])
def test_shortcuts_that_halve_and_double_are_co_isometric(norm: str, shortcut: str) -> None:
    """They cannot be orthogonal, as there are fewer outputs than inputs; but no output may be lost or stretched."""
    model = timm.create_model("sao_resnet", depth=8, norm=norm, shortcut=shortcut, img_size=8)
    method = SAO(residual="isometric", norm="identity", measure=True)
    report = sao_prune.apply(model, groups=4, method=method, example_input=torch.randn(16, 3, 8, 8), seed=0)
    for record in report.residuals[:-1]:
        assert record.after == pytest.approx((1, 1), abs=1e-5), record


@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
def test_a_padding_shortcut_with_more_blocks_than_it_can_clear_starts_with_a_silent_branch() -> None:
    model = timm.create_model("sao_resnet", depth=8, norm="none", img_size=8)
    report = isometric(model, torch.randn(1, 3, 8, 8), 16)
    assert "silent" in report.residuals[1].note
    assert not bool(model.stages[1][0].conv2.weight.any())
    assert "silent" not in report.residuals[2].note


def test_batch_norms_start_as_the_identity_on_the_calibration_batch() -> None:
    x = torch.randn(16, 3, 8, 8)
    model = timm.create_model("sao_resnet", depth=8, img_size=8)
    sao_prune.apply(model, groups=4, method=SAO(residual="isometric", norm="identity"), example_input=x, seed=0)
    seen: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    for mode in (False, True):
        model.train(mode)(x)
        assert seen
        assert all(torch.allclose(given, out, atol=1e-4) for given, out in seen)
        seen.clear()


@pytest.mark.parametrize(
    ("name", "options", "shape", "expected"),
    [
        ("sao_resnet", {"depth": 14}, (3, 16, 16), ["near"] * 6),
        ("resnet18", {"num_classes": 10}, (3, 32, 32), ["near"] * 8),
        ("sao_resmlp", {"depth": 2}, (3, 32, 32), ["exact"] * 4),
        ("sao_mixer_nano", {"depth": 1}, (3, 32, 32), ["near"] * 2),
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}, (3, 32, 32), ["left", "near"] * 2),
        ("sao_mlp", {"depth": 3, "skips": True, "activation": "relu", "width": 32}, (1, 32, 32), ["exact"] * 2),
    ],
)
def test_models_say_which_blocks_are_exact(
    name: str, options: dict[str, object], shape: tuple[int, ...], expected: list[str]
) -> None:
    model = timm.create_model(name, **options)
    method = SAO(residual="isometric", measure=False)
    example = torch.randn(2, *shape)
    preview = sao_prune.plan(model, groups=4, method=method, example_input=example)
    report = sao_prune.apply(model, groups=4, method=method, example_input=example, seed=1)
    assert [record.status for record in report.residuals] == expected
    assert preview.residuals == report.residuals
    assert [(p.groups, p.nnz) for p in preview.pruned] == [(p.groups, p.nnz) for p in report.pruned]
    model(torch.randn(2, *shape)).sum().backward()


def test_affine_layers_and_scales_of_timms_resmlp_become_neutral() -> None:
    from functools import partial

    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    block = partial(ResBlock, init_values=1e-4)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2, "mlp_ratio": 4, "num_classes": 4}
    model = MlpMixer(**shape, block_layer=block, norm_layer=Affine)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    method = SAO(residual="isometric", measure=True)
    report = sao_prune.apply(model, groups=4, method=method, example_input=torch.randn(2, 3, 32, 32), seed=0)
    blocks = report.residuals[:-1]
    assert [record.status for record in blocks] == ["exact"] * 4
    assert all(record.after == pytest.approx((1, 1), abs=1e-5) for record in blocks)


def test_nothing_is_changed_if_anything_fails() -> None:
    model = timm.create_model("sao_resnet", depth=8, img_size=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="example_input"):
        sao_prune.apply(model, groups=4, method=SAO(residual="isometric", norm="identity"), seed=0)
    bad = torch.full((2, 3, 8, 8), float("nan"))
    with pytest.raises(ValueError, match="finite"):
        sao_prune.apply(model, groups=4, method=SAO(residual="isometric", norm="identity"), example_input=bad)
    with pytest.raises(ValueError, match="no residual addition"):
        sao_prune.apply(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), groups=2, method=SAO(residual="isometric"))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_a_default_device_and_type_change_nothing(shortcut: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("sao_resnet", depth=8, img_size=8, shortcut=shortcut)
    under, x = copy.deepcopy(plain), torch.randn(4, 3, 8, 8)
    method = SAO(residual="isometric", norm="identity")
    sao_prune.apply(plain, groups=4, method=method, example_input=x, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            sao_prune.apply(under, groups=4, method=method, example_input=x, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, value), other in zip(plain.state_dict().items(), under.state_dict().values()):
        assert torch.equal(value, other), name


def test_models_of_other_types() -> None:
    model = timm.create_model("sao_resnet", depth=8, img_size=8, norm="none").double()
    report = sao_prune.apply(model, groups=4, method=SAO(residual="isometric"), seed=0)
    assert report.residuals[0].status == "exact"
    assert model.stem.weight.dtype == torch.float64


def test_options_that_contradict_one_another_are_refused() -> None:
    for options in ({"gain": 1.1}, {"conv": "eco"}, {"nonlinearity": "relu"}, {"topology": "expander"}, {"variant": 2}):
        with pytest.raises(ValueError, match="residual='isometric' goes with"):
            SAO(residual="isometric", **options)
    with pytest.raises(ValueError, match="norm and measure"):
        SAO(norm="identity")
    with pytest.raises(ValueError, match="whole model"):
        SAO(residual="isometric").draw([], [], 0)
