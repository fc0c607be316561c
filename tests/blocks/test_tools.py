"""Compact models in the hands of tools: memory formats, sharding, computed parameters, replicas; what is verified."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import BlockLinear, BlockModule

from ..processes import in_two_processes


def _convolutions(dims: int) -> tuple[nn.Module, Tensor]:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(*(conv(8, 8, 3, padding=1) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.compact(model)
    return model[1].eval(), torch.randn(2, 8, *[5] * dims)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("form", [torch.channels_last, torch.channels_last_3d])
def test_blocks_have_no_memory_format(dims: int, form: torch.memory_format) -> None:
    model, x = _convolutions(dims)
    expected = model(x)
    model.to(memory_format=form)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.to(torch.float64)
    torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-4, atol=1e-5)


def _linear() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.compact(model)
    return model, torch.randn(3, 16)


def test_parameters_that_are_attributes() -> None:
    model, x = _linear()
    y = model(x)

    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    replica = copy.copy(model[1])
    replica.__dict__ = {**model[1].__dict__, "_parameters": {}}
    replica.blocks, replica.bias = model[1].blocks.detach(), model[1].bias.detach()
    torch.testing.assert_close(replica(x), model[1](x))
    nn.utils.parametrize.register_parametrization(model[1], "bias", Twice())
    nn.utils.prune.random_unstructured(model[1], "blocks", amount=0.0)
    plain = copy.deepcopy(model[0])
    torch.testing.assert_close(model[1](plain(x)) - model[1].bias / 2, y_of(model, plain, x))
    assert torch.isfinite(y).all()


def y_of(model: nn.Sequential, first: nn.Module, x: Tensor) -> Tensor:
    """The second layer's result with half the bias, that is with the one it had."""
    layer = model[1]
    return nn.functional.linear(first(x), layer.weight, layer.bias / 2)


class _Off(nn.Module):
    """A small output that a conversion must not change by its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _linear()[0]
        sao_prune.expand(self.net)

    def forward(self, x: Tensor) -> Tensor:
        compact = isinstance(self.net[1], BlockModule)
        return self.net(x) * 1e-4 + (2e-4 if compact else 0.0)


def test_small_outputs_are_verified_too() -> None:
    model, x = _Off(), torch.randn(3, 16)
    with pytest.raises(ValueError, match="differs from the original's"):
        sao_prune.compact(model, example_input=x)
    assert type(model.net[1]) is nn.Linear


def test_meta_models_take_a_state_by_assignment() -> None:
    model, x = _linear()
    state = model.state_dict()
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(state, assign=True)
    torch.testing.assert_close(empty(x), model(x))


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    mlp = nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)
    norm = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()
    model = nn.Sequential(nn.Linear(16, 64), *mlp, nn.Unflatten(1, (64, 1, 1)), *norm, nn.Flatten(), nn.Linear(64, 4))
    sao_prune.apply(model, groups=8, seed=0)
    sao_prune.compact(model, example_input=torch.randn(8, 16))
    return model


def _shard(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = _mlp()
    wrapped = FullyShardedDataParallel(
        copy.deepcopy(model),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear, BlockLinear}),
        device_id=torch.device("cpu"),
    )
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for each in (model, wrapped):
        optimizer = torch.optim.SGD(each.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(x).square().mean()
            loss.backward()
            optimizer.step()
        torch.save(loss.detach(), f"{folder}/{type(each).__name__}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    in_two_processes(_shard, str(tmp_path))
    for rank in (0, 1):
        alone = torch.load(tmp_path / f"Sequential-{rank}.pt")
        sharded = torch.load(tmp_path / f"FullyShardedDataParallel-{rank}.pt")
        torch.testing.assert_close(sharded, alone, rtol=1e-3, atol=1e-5)


def _tune(rank: int, folder: str) -> None:
    from sao_prune.blocks import tuning

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    if rank:
        tuning.time_layer = None  # type: ignore[assignment]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.Linear(256, 4))
    sao_prune.apply(model, groups=16, seed=0, skip_first=False)
    report = sao_prune.compact(model, example_input=torch.randn(64, 256), tune="infer")
    assert report.plan is not None
    Path(f"{folder}/plan-{rank}.json").write_text(report.plan.to_json())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_run_as_the_first_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAO_PRUNE_TUNING_CACHE", "0")
    in_two_processes(_tune, str(tmp_path))
    first, second = ((tmp_path / f"plan-{rank}.json").read_text() for rank in (0, 1))
    assert first == second


def test_blocks_that_torchao_has_quantized() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64))
    sao_prune.apply(model, groups=4, seed=0, skip_first=False, skip_last=False)
    x = torch.randn(32, 64)
    sao_prune.compact(model, example_input=x)
    expected = model(x)
    config = quantization.FqnToConfig({r"re:.*blocks$": quantization.Int8WeightOnlyConfig()})
    quantization.quantize_(model, config, filter_fn=None)
    assert type(model[0].blocks.data) not in (Tensor, nn.Parameter)
    assert float((model(x) - expected).norm() / expected.norm()) < 0.03
