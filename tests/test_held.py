"""Held models among other things: copies, averages, states of other models, half precision, recurrent layers."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sao_prune
from sao_prune import analysis, compact, hold, release
from sao_prune.nn import ECOConv2d

STEPS = 3


class Recurrent(nn.Module):
    """A recurrent layer or cell between two linear ones."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner, self.kind, self.outer = nn.Linear(16, 16), kind(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.kind(self.inner(x))
        return self.outer(y[0] if isinstance(y, tuple) else y)


def masked(seed: int = 0, groups: int = 4, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    sao_prune.apply(model, groups=groups, seed=seed, skip_first=False)
    return model


def as_compact(seed: int = 0, groups: int = 4) -> nn.Module:
    model = masked(seed, groups)
    compact(model)
    return model


def eco(seed: int = 0, groups: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(ECOConv2d(8, 16, 3, groups=groups, seed=seed), nn.Flatten(), nn.Linear(16 * 36, 4))


def recurrent(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Recurrent(kind)
    sao_prune.apply(model, groups=4, seed=0, skip_first=False)
    return model


MODELS = {
    "masked": (masked, (3, 16)),
    "compact": (as_compact, (3, 16)),
    "eco": (eco, (2, 8, 6, 6)),
    **{
        k.__name__: (lambda k=k: recurrent(k), (3, 16) if "Cell" in k.__name__ else (5, 2, 16))
        for k in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell)
    },
}


def train(model: nn.Module, x: torch.Tensor, after=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        after()


def drift(weight: torch.Tensor, gain: float = 1.0) -> float:
    return float((torch.linalg.svdvals(weight.detach().float()) - gain).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_held_and_released_in_any_order(name):
    """No act on one of three changes another: neither what it computes nor whether it is held."""
    make, shape = MODELS[name]
    x = torch.randn(shape)
    original = make()
    count = len(hold(original).held)
    assert count
    train(original, x)
    for order in itertools.permutations(range(3)) if name == "masked" else [(1, 0, 2)]:
        models = [original, copy.deepcopy(original)]
        models.append(copy.deepcopy(models[1]))
        with torch.no_grad():
            next(models[1].parameters()).add_(0.1)
        for index in order:
            outputs = [model(x) for model in models]
            assert len(release(models[index]).released) == count
            for model, before in zip(models, outputs):
                torch.testing.assert_close(model(x), before)
            models[index](x).sum().backward()
        assert [len(release(model).layers) for model in models] == [0, 0, 0]
        original = models[order[0]]
        assert len(hold(original).held) == count


def test_copies_may_be_parametrized_by_others():
    x = torch.randn(3, 16)
    model = masked()
    hold(model)
    twin = copy.deepcopy(model)
    before = model(x)
    nn.utils.parametrize.register_parametrization(twin[0], "bias", nn.Identity())
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(twin(x), before)
    nn.utils.parametrize.remove_parametrizations(twin[0], "weight_orig")
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_averages_stay_orthogonal(name, use_buffers):
    make, shape = MODELS[name]
    x = torch.randn(shape)
    model = make()
    report = hold(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    train(model, x, lambda: average.update_parameters(model))
    state = copy.deepcopy(average.module.state_dict())
    fresh = make()
    hold(fresh)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), average(x))
    assert len(release(average).released) == len(report.held)
    torch.testing.assert_close(average(x), fresh(x), atol=1e-5, rtol=1e-5)
    if name == "masked":
        assert drift(average.module[1].weight) < 1e-4
    model(x).sum().backward()


@pytest.mark.parametrize("make", [masked, as_compact, eco])
def test_a_state_brings_its_own_blocks(make, tmp_path):
    shape = (2, 8, 6, 6) if make is eco else (3, 16)
    x = torch.randn(shape)
    one, two, three = make(seed=0), make(seed=1), make(seed=2)
    for model in (one, two, three):
        hold(model)
    train(one, x)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two(x), one(x))
    sao_prune.load(three, sao_prune.save(one, tmp_path / "m.safetensors"))
    torch.testing.assert_close(three(x), one(x))
    for model in (two, three):
        train(model, x)
        if make is masked:
            assert int((model[1].weight != 0).sum()) == model[1].weight_mask.sum() == 16 * 16 / 4
            assert drift(model[1].weight) < 1e-4
        y = model(x)
        release(model)
        torch.testing.assert_close(model(x), y)


def test_the_gain_is_part_of_the_state():
    models = [nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for _ in range(2)]
    for model, gain in zip(models, (1.3, 0.7)):
        sao_prune.apply(model, groups=4, method=sao_prune.SAO(gain=gain), seed=0)
        hold(model)
    models[1].load_state_dict(models[0].state_dict())
    assert drift(models[1][1].weight_orig, 1.3) < 1e-5


@pytest.mark.parametrize("make", [masked, eco])
def test_a_state_of_other_blocks_is_refused(make):
    one, two = make(groups=2), make(groups=4)
    hold(one)
    hold(two)
    with pytest.raises(RuntimeError, match="blocks of other shapes"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("damage", [torch.zeros(3), torch.tensor([1, 2], dtype=torch.int32), torch.tensor(4)])
def test_a_damaged_state_is_refused(damage):
    model = masked()
    hold(model)
    key = next(k for k in model.state_dict() if k.endswith("_extra_state"))
    with pytest.raises(RuntimeError, match="_extra_state: the entry is"):
        model.load_state_dict({**model.state_dict(), key: damage})


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["masked", "compact", "eco", "LSTM"])
def test_other_precisions(name, dtype, orthogonal_map):
    make, shape = MODELS[name]
    x = torch.randn(shape).to(dtype)
    model = make().to(dtype)
    y = model(x)
    hold(model, orthogonal_map=orthogonal_map)
    # Values are drawn in float32.
    eps = max(torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(model(x), y, atol=16 * eps, rtol=16 * eps)
    train(model, x)
    assert {p.dtype for p in model.parameters()} == {dtype}
    if name == "masked":
        gain = float(torch.linalg.svdvals(model[1].weight.detach().double()).mean())
        assert drift(model[1].weight.double(), gain) < 4 * eps
    y = model(x)
    release(model)
    torch.testing.assert_close(model(x), y, atol=16 * eps, rtol=16 * eps)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_casting_a_held_model_keeps_it_orthogonal():
    model = masked()
    hold(model)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float32):
        model.to(dtype)
    assert drift(model[1].weight) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert drift(model[1].weight) < 1e-6


def test_reports_say_why_a_layer_is_not_held():
    model = masked()
    hold(model, include=["1"])
    nn.utils.prune.identity(model[0], "bias")
    assert "its weight is held orthogonal" in str(hold(model))
    with pytest.raises(ValueError, match=r"1\.weight: its weight is held orthogonal"):
        hold(model, include=["1"])


def test_the_eco_operator_of_a_loaded_state_is_orthogonal():
    one, two = eco(seed=0), eco(seed=1)
    hold(one)
    hold(two)
    train(one, torch.randn(2, 8, 6, 6))
    two.load_state_dict(one.state_dict())
    values = analysis.singular_values(two[0], (8, 6, 6))
    assert (values - 1).abs().max() < 1e-4


@torch.no_grad()
def broadcast(one: nn.Module, other: nn.Module) -> None:
    """As DDP does: parameters and buffers of one model into the memory of another."""
    for mine, theirs in zip([*other.parameters(), *other.buffers()], [*one.parameters(), *one.buffers()]):
        mine.data.copy_(theirs)


@pytest.mark.parametrize("acts", [lambda m: m, copy.deepcopy, lambda m: m.double().float()])
@pytest.mark.parametrize("make", [masked, as_compact, eco])
def test_a_rank_that_drew_for_itself_takes_over_the_blocks_that_it_is_sent(make, acts):
    x = torch.randn((2, 8, 6, 6) if make is eco else (3, 16))
    one, two = make(seed=0), make(seed=1)
    hold(one)
    hold(two)
    train(one, x)
    train(two, x)
    assert not torch.allclose(two(x), one(x))
    broadcast(one, two)
    two = acts(two)
    torch.testing.assert_close(two(x), one(x))
    for model in (one, two):
        train(model, x)
    broadcast(one, two)
    torch.testing.assert_close(two(x), one(x))
    three = make(seed=2)
    hold(three)
    three.load_state_dict(two.state_dict())
    torch.testing.assert_close(three(x), one(x))
    y = two(x)
    release(two)
    torch.testing.assert_close(two(x), y)
    if make is masked:
        assert torch.equal(two[1].weight_mask, one[1].weight_mask)
        assert int((two[1].weight != 0).sum()) == 16 * 16 / 4


def test_the_state_of_a_rank_that_was_sent_blocks_is_right_at_once():
    one, two, three = masked(seed=0), masked(seed=1), masked(seed=2)
    for model in (one, two, three):
        hold(model)
    broadcast(one, two)
    three.load_state_dict(two.state_dict())
    x = torch.randn(3, 16)
    torch.testing.assert_close(three(x), one(x))


def test_a_gain_that_is_sent_is_taken_over():
    models = [nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for _ in range(2)]
    for model, gain in zip(models, (1.3, 0.7)):
        sao_prune.apply(model, groups=4, method=sao_prune.SAO(gain=gain), seed=0)
        hold(model)
    broadcast(*models)
    assert drift(models[1][1].weight_orig, 1.3) < 1e-5


def called_with(model: nn.Module, other: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(model, {**dict(other.named_parameters()), **dict(other.named_buffers())}, (x,))


@pytest.mark.parametrize("make", [masked, eco])
def test_a_call_with_parameters_of_other_blocks_is_refused(make):
    x = torch.randn((2, 8, 6, 6) if make is eco else (3, 16))
    one, two = make(seed=0), make(seed=1)
    hold(one)
    hold(two)
    twin = copy.deepcopy(one)
    train(twin, x)
    torch.testing.assert_close(called_with(one, twin, x), twin(x))
    with pytest.raises(RuntimeError, match="held in other blocks"):
        called_with(one, two, x)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(called_with(one, two, x), two(x))
    torch.testing.assert_close(called_with(one.double(), two.double(), x.double()), two(x.double()))


def test_ensembles_of_held_models():
    one = masked()
    hold(one)
    two, three = copy.deepcopy(one), masked(seed=1)
    hold(three)
    x = torch.randn(3, 16)
    train(two, x)

    def outputs(*models: nn.Module) -> torch.Tensor:
        parameters, buffers = torch.func.stack_module_state(list(models))
        return torch.func.vmap(lambda p, b: torch.func.functional_call(one, (p, b), (x,)))(parameters, buffers)

    torch.testing.assert_close(outputs(one, two), torch.stack([one(x), two(x)]))
    with pytest.raises(RuntimeError, match="held in other blocks"):
        outputs(one, three)


def test_held_models_are_compiled_and_exported():
    model, x = masked(), torch.randn(3, 16)
    hold(model)
    train(model, x)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), y)
    torch.testing.assert_close(torch.export.export(model.eval(), (x,), strict=False).module()(x), y)
