"""Residual additions are found in any model, whatever it is written like."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import sao_prune
import sao_prune.models
from sao_prune.discovery.dataflow import record
from sao_prune.discovery.residual import ResidualBlock, find_residuals


class Written(nn.Module):
    """``relu(x + fc2(relu(fc1(x))))`` in several ways of writing it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        h = self.fc2(self.fc1(x).relu())
        if self.how == "in place":
            h += x
            return h.relu_()
        if self.how == "method":
            return torch.clamp(x.add(h), min=0) if x is None else x.add(h).relu()
        if self.how == "function":
            return torch.relu(torch.add(h, x))
        return nn.functional.relu(x + h)


def only(model: nn.Module, x: Tensor) -> ResidualBlock:
    (block,) = find_residuals(model, x).blocks
    return block


@pytest.mark.parametrize("how", ["operator", "in place", "method", "function"])
def test_an_addition_is_found_however_it_is_written(how: str) -> None:
    block = only(Written(how), torch.randn(2, 4))
    assert (block.kind, block.shortcut, block.reason) == ("relu", "identity", None)
    assert [layer.weight for layer in block.layers] == ["fc1.weight", "fc2.weight"]
    assert block.activations == ("relu",)


def test_a_recorded_graph_gives_the_same_outputs_again() -> None:
    model = timm.create_model("sao_resnet", depth=8).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = record(model, x)
    values = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    *_, (_, out) = graph.run(values)
    torch.testing.assert_close(out, model(x))
    doubled = {**values, "head.weight": 2 * values["head.weight"], "head.bias": 2 * values["head.bias"]}
    *_, (_, out) = graph.run(doubled)
    torch.testing.assert_close(out, 2 * model(x))


def test_recording_leaves_modes_and_the_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model[1].train()
    model[0].eval()
    state = torch.get_rng_state()
    record(model, torch.randn(2, 4, generator=torch.Generator()))
    assert model[1].training
    assert not model[0].training
    assert torch.equal(torch.get_rng_state(), state)


class Counting(nn.Module):
    """Counts its calls in buffers, one written in place and one replaced; fails if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.calls += 1
        self.last = x[0].detach()
        y = self.head(x + self.fc(x))
        if fail:
            raise RuntimeError("told to")
        return y


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("fail", [False, True])
def test_what_a_forward_writes_to_buffers_is_undone(inference: bool, fail: bool) -> None:
    with torch.inference_mode(inference):
        model, x = Counting(), torch.randn(2, 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = dict(model.named_buffers())
    for look in (record, lambda net, given: sao_prune.plan(net, groups=2, example_input=given, skip_first=False)):
        with torch.inference_mode(inference):
            if fail:
                with pytest.raises(ValueError, match="told to"):
                    look(model, (x, True))
            else:
                look(model, (x,))
        assert all(buffer is own[name] for name, buffer in model.named_buffers())
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_it_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    assert [block.shortcut for block in find_residuals(model).blocks].count("projection") == 3


class Odd(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.what = nn.Linear(4, 4), nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "shared":
            return x + self.fc1(self.fc1(x).relu())
        if self.what == "gated":
            return x + self.fc2(self.fc1(x) * x)
        if self.what == "last":
            return x + self.fc1(x).tanh()
        if self.what == "before":
            return x + self.fc2(self.fc1(x.relu()).relu())
        if self.what == "twice":
            return x + self.fc2(self.fc1(x).relu().tanh())
        return x + self.fc2(self.fc1(x).softmax(-1))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("shared", "once"),
        ("gated", "mul"),
        ("last", "ends in"),
        ("softmax", "softmax"),
        ("before", "a relu stands before its first layer"),
        ("twice", "a tanh follows another"),
    ],
)
def test_what_is_no_chain_of_layers_is_left_with_a_reason(what: str, reason: str) -> None:
    found = only(Odd(what), torch.randn(2, 4)).reason
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("name", "blocks", "ends"),
    [
        ("resnet18", 8, (("conv1.weight",), ("fc.weight",))),
        ("sao_resnet", 9, (("stem.weight",), ("head.weight",))),
        ("vit_tiny_patch16_224", 24, ((), ())),
        ("sao_mixer_nano", 16, ((), ())),
    ],
)
def test_models(name: str, blocks: int, ends: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = find_residuals(model)
    assert len(found.blocks) == blocks
    assert (found.entries, found.exits) == ends


class Affine(nn.Module):
    """``x + scale * fc2(relu(fc1(shift + scale * x)))``, with ``addcmul`` given in all ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = {
            "before": lambda: torch.addcmul(self.shift, self.scale, x),
            "after": lambda: torch.addcmul(self.shift, x, self.scale),
            "named": lambda: torch.addcmul(self.shift, tensor1=self.scale, tensor2=x),
            "weighted": lambda: torch.addcmul(self.shift, self.scale, x, value=0.5),
            "of itself": lambda: torch.addcmul(x, self.scale, x),
        }[self.how]()
        return x + self.scale * self.fc2(self.fc1(y).relu())


@pytest.mark.parametrize("how", ["before", "after", "named", "weighted", "of itself"])
def test_an_affine_layer_is_a_scale_and_a_shift(how: str) -> None:
    block = only(Affine(how), torch.randn(2, 4))
    if how in ("weighted", "of itself"):
        assert block.reason is not None
        assert "addcmul" in block.reason
    else:
        assert (block.reason, block.scales, block.shifts) == (None, ("scale", "scale"), ("shift",))


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_looked_at_as_they_are_written(in_place: bool) -> None:
    compiled = []

    def backend(module: nn.Module, _: object) -> object:
        compiled.append(module)
        return module.forward

    model, x = Written("operator").eval(), torch.randn(2, 4)
    with torch.no_grad():
        if in_place:
            model.compile(backend=backend)
            made = model
        else:
            made = torch.compile(model, backend=backend)  # type: ignore[assignment]
        made(x)
    assert len(compiled) == 1
    block = only(made, x)
    assert [layer.weight.removeprefix("_orig_mod.") for layer in block.layers] == ["fc1.weight", "fc2.weight"]
    assert len(compiled) == 1


def test_without_an_example_it_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="give example_input"):
        find_residuals(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)))
