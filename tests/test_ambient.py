"""What is switched on where a verb is called changes nothing: autocast, a default type, a default device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sao_prune
from sao_prune import SAO, SNIP, GraSP, Project, SynFlow, analysis
from sao_prune.blocks import layout
from sao_prune.nn import ECOConv2d, SkewConv2d

pytestmark = pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(32, 3, 6, 6, generator=GENERATOR), torch.arange(32) % 4


class Residual(nn.Module):
    """A network that every method takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.norm(self.one(x))))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


METHODS = {
    **{name: name for name in ("sao", "rg", "gmp", "lmp", "lrp", "eoi", "nm", "set", "rigl", "rewire")},
    "eco": SAO(conv="eco"),
    "mirrored": SAO(nonlinearity="relu"),
    "isometric": SAO(residual="isometric", norm="identity"),
    "expander": SAO(topology="expander", values="nearly_orthogonal"),
    "radix": sao_prune.RG(topology="radix", values="normal"),
    "product": sao_prune.RG(topology="product", values="uniform"),
    "snip": SNIP(inputs=X, targets=Y),
    "grasp": GraSP(inputs=X, targets=Y),
    "synflow": SynFlow(3, inputs=X),
    "project": Project(inputs=X, samples=16),
    "shared": Project(inputs=X, samples=16, shared_sets=True),
    "polar": Project(inputs=X, samples=16, topology="ramanujan", values="orthogonal"),
}


class Elsewhere(TorchFunctionMode):
    """As a default device that is not the CPU: tensors of the library's own have to say where they are."""

    makers = (
        torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint,
        torch.randn, torch.randperm, torch.tensor, torch.zeros,
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1)
        if func in self.makers and not (kwargs or {}).get("device"):
            where = f"{caller.f_globals['__name__']}:{caller.f_lineno}"
            assert not where.startswith("sao_prune"), f"{where} makes a tensor on the default device"
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "type": default_dtype,
    "device": Elsewhere,
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    plain = Residual()
    models = {ambient: Residual() for ambient in AMBIENTS}
    for model in models.values():
        model.load_state_dict(plain.state_dict())
    options: dict[str, Any] = {"sparsity": 0.5, "method": METHODS[name], "example_input": X, "seed": 0}
    if name == "expander":
        options["include"] = ["fc"]  # the search for its values takes a while
    sao_prune.apply(plain, **options)
    for ambient, model in models.items():
        with AMBIENTS[ambient]():
            sao_prune.apply(model, **options)
        for (key, value), other in zip(plain.state_dict().items(), model.state_dict().values()):
            assert torch.equal(value, other), (ambient, key)


@pytest.mark.parametrize("layer", [ECOConv2d, SkewConv2d])
@pytest.mark.parametrize("ambient", ["autocast", "type"])
def test_orthogonal_layers_have_the_same_values(layer: Any, ambient: str) -> None:
    plain = layer(4, 8, 3, groups=2, seed=0)
    with AMBIENTS[ambient]():
        made = layer(4, 8, 3, groups=2, seed=0)
    assert made.weight.dtype is (torch.float64 if ambient == "type" else torch.float32)
    assert torch.equal(made.weight.float(), plain.weight)


@pytest.mark.parametrize("layer", [ECOConv2d, SkewConv2d])
def test_orthogonal_layers_are_made_where_torch_makes_layers(layer: Any) -> None:
    with torch.device("meta"):
        made = layer(4, 8, 3, groups=2, seed=0)
    assert all(tensor.is_meta for tensor in made.state_dict().values())


def test_held_convolutions_are_as_exact_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ECOConv2d(8, 8, 3, seed=0), nn.ReLU(), ECOConv2d(8, 8, 3, seed=1))
    sao_prune.hold(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 8)
    with torch.autocast("cpu", torch.bfloat16):
        weight = model[0].weight.detach()
    assert torch.equal(weight, model[0].weight)


def test_a_schedule_prunes_the_same_inside_autocast() -> None:
    found = []
    for ambient in (default_dtype, AMBIENTS["autocast"]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        x = torch.randn(32, 16)
        over = sao_prune.Schedule(start=1, end=2, steps=2)
        pruner = sao_prune.schedule(model, Project(inputs=x), groups=4, over=over, seed=0)
        with ambient():
            pruner.step()
            pruner.step()
        found.append(model[1].weight_orig.detach().clone())
    assert torch.equal(*found)


def test_what_is_analysed_is_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    sparse = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    sao_prune.apply(sparse, groups=4, seed=0)
    mask = sparse[1].weight_mask

    def measure() -> list[Any]:
        attacked = [
            analysis.worst_case(net, X, Y, analysis.Threat(norm, 0.2), steps=3, queries=4).right
            for norm in ("linf", "l2")
        ]
        spectrum = analysis.jacobian_spectrum(net, X[:1])
        return [
            *attacked,
            analysis.pgd_l2(net, X, Y, steps=2),
            analysis.lipschitz_bound(net, iterations=3),
            analysis.margin_constants(net),
            analysis.singular_values(net[0], (3, 6, 6)),
            torch.tensor([spectrum.mean, spectrum.largest], dtype=torch.float64, device="cpu"),
            analysis.adjacency_eigenvalues(mask),
            torch.tensor([layer.values for layer in analysis.storage(sparse).layers], device="cpu"),
        ]

    plain = measure()
    for ambient in ("type", "device"):
        with AMBIENTS[ambient]():
            assert all(torch.equal(a, b) for a, b in zip(plain, measure(), strict=True)), ambient


def test_calibration_runs_the_model_with_the_default_device_of_its_caller() -> None:
    seen = []

    class Asks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_default_device().type)
            return super().forward(x)

    model = Asks(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.device("meta"):
        sao_prune.apply(model, groups=2, method=Project(inputs=torch.ones(4, 8, device="cpu")), seed=0)
    assert set(seen) == {"meta"}


class Mixed(nn.Module):
    """Layers with several weights, besides those of `Residual`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body.stem(x).flatten(2).mT
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.body(x) + self.head(self.recurrent(tokens)[0].mean(1))


@pytest.mark.parametrize("groups", [4, 3])
@pytest.mark.parametrize("topology", ["interleaved", "ramanujan"])
@pytest.mark.parametrize("ambient", ["type", "device"])
def test_compact_models(ambient: str, topology: str, groups: int, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, fresh, direct = Mixed().eval(), Mixed().eval(), Mixed().eval()
    direct.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"groups": groups, "method": SAO(topology=topology), "seed": 0}
    sao_prune.apply(model, **options)
    expected = model(X)
    layout.layout_of_topology.cache_clear()
    layout._KNOWN.clear()
    with AMBIENTS[ambient]():
        sao_prune.apply(direct, form="compact", **options)
        sao_prune.compact(model, example_input=X)
        found = [model(X), direct(X)]
        sao_prune.save(model, tmp_path / "model.safetensors")
        sao_prune.load(fresh, tmp_path / "model.safetensors")
        found.append(fresh(X))
        sao_prune.expand(model)
        found.append(model(X))
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    sao_prune.apply(model, groups=4, seed=0)
    with torch.inference_mode():
        x = X.clone()
        expected = model(x)
        sao_prune.compact(model, example_input=x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        sao_prune.hold(model)
    model(X).sum().backward()
    with torch.inference_mode():
        sao_prune.release(model)
        sao_prune.expand(model)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
