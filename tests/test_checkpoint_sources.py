"""Checkpoints as other tools write them: prefixes, wrappings, shards, tied weights, held layers."""

import argparse
import copy
import json
import pathlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sao_prune
from sao_prune import CheckpointError

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An embedding whose matrix is the classifier's too, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(12, 8), mlp(), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


def pruned(seed: int = 0) -> nn.Sequential:
    model = mlp(seed)
    sao_prune.apply(model, groups=4, seed=seed)
    return model


def compacted(seed: int = 0) -> nn.Sequential:
    model = pruned(seed)
    sao_prune.compact(model)
    return model


def held(seed: int = 0) -> nn.Sequential:
    model = pruned(seed)
    sao_prune.hold(model)
    with torch.no_grad():
        model[1].parametrizations["weight_orig"].original0.normal_()
    return model


def held_compact(seed: int = 0) -> nn.Sequential:
    model = compacted(seed)
    sao_prune.hold(model)
    return model


def lightning(state: dict[str, torch.Tensor]) -> dict:
    """What a trainer writes around a state dict."""
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(8, 8)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 3, "_get_lr_called_within_step": False}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "data": pathlib.Path("data"), "args": argparse.Namespace(model="mlp")},
    }


def wrapped(state: dict[str, torch.Tensor], prefix: str) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("make", [mlp, pruned, compacted])
@pytest.mark.parametrize("target", [mlp, pruned, compacted])
def test_a_trainers_checkpoint(make, target, tmp_path):
    model, fresh = make(), target(5 if make is target else 0)
    torch.save(lightning(model.state_dict()), tmp_path / "last.ckpt")
    sao_prune.load(fresh, tmp_path / "last.ckpt")
    if make is mlp and target is not mlp:
        # Under the masks, or into the blocks, that the model has.
        for index in (1, 2):
            model[index].weight.data *= pruned()[index].weight_mask
    torch.testing.assert_close(fresh(X), model(X))


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "module.", "_orig_mod.", "model.module._orig_mod.", "0.", "a.b.c."]
)
@pytest.mark.parametrize("make", [mlp, pruned, compacted, held])
def test_any_prefix_that_all_names_share(prefix, make, tmp_path):
    model = make()
    torch.save({"epoch": 1, "state_dict": wrapped(model.state_dict(), prefix)}, tmp_path / "m.pth")
    fresh = held(3) if make is held else mlp(3)
    sao_prune.load(fresh, tmp_path / "m.pth")
    torch.testing.assert_close(fresh(X), model(X))


def test_a_prefix_that_the_model_has_and_the_checkpoint_not(tmp_path):
    model = pruned()
    target = nn.ModuleDict({"model": mlp(3)})
    sao_prune.load(target, sao_prune.save(model, tmp_path / "m.safetensors"))
    torch.testing.assert_close(target["model"](X), model(X))
    compiled = torch.compile(mlp(4), backend="eager")
    sao_prune.load(compiled, sao_prune.save(model, tmp_path / "m.safetensors"))
    torch.testing.assert_close(compiled(X), model(X))


def test_names_that_fit_as_they_are_stay(tmp_path):
    """A model whose own names begin alike keeps them, whatever they resemble."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))
    target = copy.deepcopy(model)
    nn.init.zeros_(target[0][0].weight)
    sao_prune.load(target, sao_prune.save(model, tmp_path / "m.safetensors"))
    torch.testing.assert_close(target(X), model(X))


def test_several_models_in_one_state(tmp_path):
    student, teacher = pruned(0), pruned(1)
    state = {**wrapped(student.state_dict(), "model."), **wrapped(teacher.state_dict(), "ema.")}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(3)}}, tmp_path / "m.ckpt")
    fresh = mlp(3)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match=r"others are not \(.*prefix='model\.'"):
        sao_prune.load(fresh, tmp_path / "m.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), fresh.state_dict().values()))
    for prefix, model in (("ema", teacher), ("model.", student)):
        sao_prune.load(fresh, tmp_path / "m.ckpt", prefix=prefix)
        torch.testing.assert_close(fresh(X), model(X))
    with pytest.raises(CheckpointError, match="no entry under the prefix 'encoder\\.'"):
        sao_prune.load(fresh, tmp_path / "m.ckpt", prefix="encoder")


def test_state_dicts_side_by_side(tmp_path):
    model = mlp(0)
    other = {"conv.weight": torch.ones(2, 2), "conv.bias": torch.ones(2)}
    torch.save({"discriminator": other, "generator": model.state_dict(), "step": 5}, tmp_path / "m.pt")
    fresh = mlp(3)
    sao_prune.load(fresh, tmp_path / "m.pt")
    torch.testing.assert_close(fresh(X), model(X))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("make", [Tied, lambda: pruned_tied(), mlp])
def test_folders_as_save_pretrained_writes_them(make, ending, shards, tmp_path):
    """Tied weights are written once, and large models in parts with an index."""
    torch.manual_seed(1)
    model = make()
    torch.manual_seed(2)
    fresh = mlp(2) if make is mlp else Tied()
    state = {key: value.detach().clone() for key, value in model.state_dict().items() if not key.startswith("head.")}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    save = save_file if ending == "safetensors" else torch.save
    (tmp_path / "config.json").write_text("{}")
    if shards == 1:
        save(state, tmp_path / f"{stem}.{ending}")
    else:
        names = {key: f"{stem}-{i % shards + 1:05d}-of-{shards:05d}.{ending}" for i, key in enumerate(state)}
        for name in set(names.values()):
            save({key: state[key] for key in state if names[key] == name}, tmp_path / name)
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    sao_prune.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(X), model(X))
    if make is not mlp:
        assert fresh.head.weight is fresh.embed.weight
    if shards > 1:
        sao_prune.load(fresh, tmp_path / f"{stem}.{ending}.index.json")


def pruned_tied() -> nn.Module:
    model = Tied()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def test_tied_layers_that_are_pruned(tmp_path):
    def tied() -> nn.Sequential:
        model = mlp()
        model[2].weight = model[1].weight
        return model

    model, fresh = tied(), tied()
    sao_prune.apply(model, groups=4, seed=0)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("2.weight")}
    save_file(state, tmp_path / "m.safetensors")
    sao_prune.load(fresh, tmp_path / "m.safetensors")
    torch.testing.assert_close(fresh(X), model(X))
    assert fresh[2].weight_orig is fresh[1].weight_orig


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "cannot be read as the index"),
        ("[]", "cannot be read as the index"),
        ('{"weight_map": {"a": 3}}', "outside its folder"),
        ('{"weight_map": {"a": "../m.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "part.safetensors"}}', "is missing"),
        ('{"weight_map": {"a": "there.safetensors"}}', "where it is not"),
    ],
)
def test_damaged_indices(index, said, tmp_path):
    save_file({"b": torch.ones(1)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=said):
        sao_prune.load(mlp(), tmp_path)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="expected one of model"):
        sao_prune.load(mlp(), tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="distributed checkpoint"):
        sao_prune.load(mlp(), tmp_path)


class Ours:
    pass


def test_what_could_run_code_is_named(tmp_path):
    torch.save({"state_dict": mlp().state_dict(), "callback": Ours()}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"\(tests\.test_checkpoint_sources\.Ours\).*could run code"):
        sao_prune.load(mlp(), tmp_path / "m.ckpt")


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("make", [held, held_compact])
def test_held_models_are_saved_and_loaded(make, ending, tmp_path):
    model, other = make(0), make(7)
    y = model(X)
    file = sao_prune.save(model, tmp_path / f"m{ending}")
    for target in (model, other):
        sao_prune.load(target, file)
        torch.testing.assert_close(target(X), y)
        target(X).sum().backward()


@pytest.mark.parametrize(
    ("saved", "target"),
    [(a, b) for a in (held, held_compact) for b in (mlp, pruned, compacted, held, held_compact) if a is not b]
    + [(a, b) for a in (mlp, pruned, compacted) for b in (held, held_compact)],
)
def test_held_and_not_held_do_not_mix(saved, target, tmp_path):
    file = sao_prune.save(saved(0), tmp_path / "m.safetensors")
    model = target(1)
    before, y = copy.deepcopy(model.state_dict()), model(X)
    with pytest.raises(CheckpointError, match="is held in the"):
        sao_prune.load(model, file)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values()))
    torch.testing.assert_close(model(X), y)


def test_a_failure_in_the_middle_gives_back_what_was_held(tmp_path):
    class Refuses(nn.Linear):
        def _load_from_state_dict(self, *args: object) -> None:
            super()._load_from_state_dict(*args)
            raise RuntimeError("no")

    def make(last: type[nn.Linear], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), last(8, 8))
        sao_prune.apply(model, groups=4, seed=seed)
        sao_prune.hold(model)
        return model

    model = make(Refuses, 1)
    y = model(X)
    with pytest.raises(CheckpointError, match="refused the checkpoint and is unchanged: no"):
        sao_prune.load(model, sao_prune.save(make(nn.Linear, 0), tmp_path / "m.pt"))
    torch.testing.assert_close(model(X), y)
    assert int((model[1].weight != 0).sum()) == 16
