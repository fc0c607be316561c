"""Checkpoints of every kind into models of every kind."""

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sao_prune
from sao_prune import CheckpointError


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4)
    )


def pruned(seed=0, draw=0):
    model = make(seed)
    sao_prune.apply(model, groups=4, seed=draw)
    return model


def same(a, b):
    x = torch.randn(2, 3, 6, 6)
    return torch.equal(a.eval()(x), b.eval()(x))


@pytest.fixture(params=[".safetensors", ".pt"])
def ending(request):
    return request.param


def test_pruned_into_dense_and_into_pruned(tmp_path, ending):
    model = pruned()
    file = sao_prune.save(model, tmp_path / f"m{ending}")
    for target in (make(1), pruned(1, draw=7)):
        report = sao_prune.load(target, file)
        assert same(target, model)
        assert report.sparsity == 0.75
        target(torch.randn(2, 3, 6, 6)).sum().backward()
        assert target[2].weight_orig.grad is not None
        assert set(target.state_dict()) == set(model.state_dict())


def test_dense_into_pruned_goes_under_the_masks(tmp_path, ending):
    dense = make(3)
    file = sao_prune.save(dense, tmp_path / f"m{ending}")
    target = pruned()
    mask = target[4].weight_mask.clone()
    sao_prune.load(target, file)
    assert torch.equal(target[4].weight_orig, dense[4].weight)
    assert torch.equal(target[4].weight_mask, mask)
    assert torch.equal(target[4].weight, dense[4].weight * mask)


def test_baked_into_dense_and_into_the_same_masks(tmp_path, ending):
    model = pruned()
    twin = copy.deepcopy(model)
    sao_prune.remove(model)
    file = sao_prune.save(model, tmp_path / f"m{ending}")
    for target in (make(1), twin):
        sao_prune.load(target, file)
        assert same(target, model)


def test_baked_into_other_masks_is_refused(tmp_path):
    model = pruned()
    sao_prune.remove(model)
    file = sao_prune.save(model, tmp_path / "m.safetensors")
    target = pruned(draw=5)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match="sparse already, with other non-zeros"):
        sao_prune.load(target, file)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), target.state_dict().values()))


def test_masks_take_a_byte_an_entry(tmp_path):
    file = sao_prune.save(pruned(), tmp_path / "m.safetensors")
    assert load_file(file)["2.weight_mask"].dtype == torch.bool


def test_training_scripts_wrappings(tmp_path):
    model = pruned()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "args": {"lr": 0.1}}, tmp_path / "m.pth")
    target = make(1)
    sao_prune.load(target, tmp_path / "m.pth")
    assert same(target, model)


def test_tied_weights(tmp_path, ending):
    def tied():
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        model[2].weight = model[1].weight
        return model

    model, target = tied(), tied()
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.load(target, sao_prune.save(model, tmp_path / f"m{ending}"))
    x = torch.randn(2, 8)
    assert torch.equal(target(x), model(x))
    assert target[1].weight_orig is target[2].weight_orig


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_a_module_that_is_used_twice(tmp_path, ending):
    def shared():
        block = nn.Linear(8, 8)
        return nn.Sequential(nn.Linear(8, 8), block, nn.Tanh(), block, nn.Linear(8, 4))

    model, fresh, other, dense = shared(), shared(), shared(), shared()
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.apply(other, groups=4, seed=1)
    x = torch.randn(3, 8)
    path = sao_prune.save(model, tmp_path / f"m{ending}")
    for target in (fresh, other):
        sao_prune.load(target, path)
        assert torch.equal(target(x), model(x))
        assert target[1] is target[3]
    sao_prune.load(fresh, sao_prune.save(dense, tmp_path / f"d{ending}"))
    dense[1].weight.data *= fresh[1].weight_mask
    assert torch.allclose(fresh(x), dense(x))


class Twice(nn.Module):
    """A linear layer, a convolution and an attention that stand under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(16, 16)
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
        self.attention = nn.MultiheadAttention(16, 2)
        self.two, self.same, self.head = self.one, self.attention, nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.first(x)))
        x = self.two(self.one(x[:, :, None, None])).flatten(1)
        return self.head(self.same(x, x, x)[0])


def test_compact_modules_under_two_names(tmp_path, ending):
    torch.manual_seed(0)
    models = {name: Twice().eval() for name in ("masked", "compact", "dense", "other", "scaled")}
    x = torch.randn(5, 16)
    for name, seed in (("masked", 0), ("other", 1), ("scaled", 0)):
        sao_prune.apply(models[name], groups=4, seed=seed, skip_first=False)
    expected = models["masked"](x)
    masked = sao_prune.save(models["masked"], tmp_path / f"masked{ending}")
    sao_prune.load(models["compact"], masked)
    for name in ("compact", "other", "scaled"):
        sao_prune.compact(models[name])
    path = sao_prune.save(models["compact"], tmp_path / f"compact{ending}")
    for name, file in (("dense", path), ("other", path), ("masked", path), ("scaled", masked)):
        sao_prune.load(models[name], file)
        torch.testing.assert_close(models[name](x), expected)
        assert models[name].first is models[name].again
    sao_prune.expand(models["dense"])
    torch.testing.assert_close(models["dense"](x), expected)


@pytest.mark.parametrize("form", ["dense", "masked", "compact"])
@pytest.mark.parametrize("kept", [min, max])
def test_modules_under_two_names_that_are_saved_under_one(tmp_path, form, kept):
    """As tools write them that leave out what shares memory, under either name."""
    torch.manual_seed(0)
    model, fresh, x = Twice().eval(), Twice().eval(), torch.randn(5, 16)
    for each in (model, fresh):
        each.norm = each.also = nn.BatchNorm1d(16)
    model.norm.running_mean.fill_(3.0)
    if form != "dense":
        sao_prune.apply(model, groups=4, seed=0, skip_first=False)
    expected = model(x)
    if form == "compact":
        sao_prune.compact(model)
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    state = model.state_dict()
    torch.save({kept(each): state[kept(each)] for each in names.values()}, tmp_path / "m.pt")
    sao_prune.load(fresh, tmp_path / "m.pt")
    torch.testing.assert_close(fresh(x), expected)
    assert torch.equal(fresh.also.running_mean, model.norm.running_mean)


def test_a_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": make().state_dict(), "extra": Evil()}, "m.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        sao_prune.load(make(), "m.pt")
    with open("raw.pt", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(CheckpointError):
        sao_prune.load(make(), "raw.pt")
    assert not os.path.exists("evil-was-here")


def test_misfits_are_named_and_change_nothing(tmp_path):
    file = sao_prune.save(pruned(), tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 16))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError) as caught:
        sao_prune.load(other, file)
    text = str(caught.value)
    assert "2.weight_orig: the checkpoint has shape (8, 8, 3, 3), the model (6, 8, 3, 3)" in text
    assert "5.weight: the model has no such entry" in text
    assert list(other.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), other.state_dict().values()))


def test_not_strict_takes_what_fits(tmp_path):
    file = sao_prune.save(make(4), tmp_path / "m.safetensors")
    bigger = nn.Sequential(*make(5), nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match=r"6\.weight: missing from the checkpoint"):
        sao_prune.load(bigger, file)
    sao_prune.load(bigger, file, strict=False)
    assert torch.equal(bigger[4].weight, make(4)[4].weight)


def test_tensors_that_share_memory_are_saved_apart(tmp_path, ending):
    def network():
        model = make()
        schedule = torch.linspace(0, 1, 9)
        model.register_buffer("now", schedule[1:])
        model.register_buffer("before", schedule[:-1])
        model.register_buffer("first", model[0].weight.data[0])
        return model

    model, fresh = network(), network()
    sao_prune.load(fresh, sao_prune.save(model, tmp_path / f"m{ending}"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02]q\x00."])
def test_damaged_files(tmp_path, ending, content):
    file = tmp_path / f"m{ending}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        sao_prune.load(make(), file)


def test_a_mask_that_is_none(tmp_path):
    state = dict(pruned().state_dict())
    state["2.weight_mask"] = state["2.weight_mask"] * 0.5
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="values other than 0 and 1"):
        sao_prune.load(make(), tmp_path / "m.safetensors")


def test_missing_file_and_unknown_ending(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        sao_prune.load(make(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"use \.safetensors"):
        sao_prune.save(make(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = sao_prune.save(pruned(), tmp_path / "m.pt")
    content = file.read_bytes()
    monkeypatch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sao_prune.save(make(), file)
    assert file.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    "content",
    [
        {1: torch.ones(2)},
        {"0.weight": torch.ones(1).expand(4)},
        {"0.weight": torch.empty(2, device="meta")},
        {"model": {"model": {"model": {"model": {"model": {"w": torch.ones(1)}}}}}},
    ],
)
def test_odd_contents(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError):
        sao_prune.load(make(), tmp_path / "m.pt")


def test_a_state_that_contains_itself(tmp_path):
    state: dict = {}
    state["model"] = state
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        sao_prune.load(make(), tmp_path / "m.pt")


def test_bad_masks_are_refused_by_a_pruned_model_too(tmp_path):
    state = dict(pruned().state_dict())
    state["2.weight_mask"] = state["2.weight_mask"] * float("nan")
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="other than 0 and 1"):
        sao_prune.load(pruned(), tmp_path / "m.pt")


def test_buffers_that_only_sound_like_masks(tmp_path, ending):
    def make_net():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        net.register_buffer("t_orig", torch.arange(4.0))
        net.register_buffer("t_mask", torch.arange(4.0))
        return net

    model, target = make_net(), make_net()
    sao_prune.apply(model, groups=2, seed=0)
    target.t_mask.zero_()
    sao_prune.load(target, sao_prune.save(model, tmp_path / f"m{ending}"))
    assert torch.equal(target.t_mask, torch.arange(4.0))


def test_a_model_that_refuses_its_state_is_as_it_was(tmp_path):
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *args, **kwargs):
            super()._load_from_state_dict(*args, **kwargs)
            raise RuntimeError("no")

    def make_net(last=nn.Linear):
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), last(8, 8))

    model, target = make_net(), make_net(Refuses)
    sao_prune.apply(model, groups=4, seed=0)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match="refused the checkpoint and is unchanged: no"):
        sao_prune.load(target, sao_prune.save(model, tmp_path / "m.pt"))
    assert list(target.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), target.state_dict().values()))


def test_compiled_models_save_and_load(tmp_path, ending):
    model = pruned()
    file = sao_prune.save(torch.compile(model, backend="eager"), tmp_path / f"m{ending}")
    target = make(1)
    sao_prune.load(target, file)
    assert same(target, model)


def test_modules_that_insist_on_their_version(tmp_path, ending):
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *args):
            if metadata.get("version") != 2:
                raise ValueError("version should be set")
            super()._load_from_state_dict(state, prefix, metadata, *args)

    def make_net():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Versioned(8, 8))

    model, target = make_net(), make_net()
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.load(target, sao_prune.save(model, tmp_path / f"m{ending}"))
    assert torch.equal(target[2].weight, model[2].weight)
