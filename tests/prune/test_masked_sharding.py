"""Masks follow their weights into sharding: masked models train as on one process under FSDP, of both kinds."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import sao_prune

from ..processes import in_two_processes


class Reads(nn.Module):
    """Uses one weight without calling its module."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        return torch.tanh(self.proj(F.linear(x, self.qkv.weight)))


class Calls(Reads):
    def forward(self, x):
        return torch.tanh(self.proj(self.qkv(x)))


def masked(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), block(), block(), nn.Linear(16, 16))
    sao_prune.apply(model, groups=4, seed=0)
    return model


def losses(model):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    out = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    with torch.no_grad():
        return torch.tensor([*out, model(x).sum().item()])


def ways():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    mesh = init_device_mesh("cpu", (2,))

    def second(pick):
        def wrap(model):
            for part in [*(part for block in model[1:3] for part in pick(block)), model]:
                # Asked for an average, the gloo of older versions of torch adds (pytorch issue 162338).
                fully_shard(part, mesh=mesh).set_force_sum_reduction_for_comms(True)
            return model

        return wrap

    def first(kinds, original):
        policy = ModuleWrapPolicy(kinds)
        return lambda model: FullyShardedDataParallel(
            model, use_orig_params=original, auto_wrap_policy=policy, device_id=torch.device("cpu")
        )

    yield "fully_shard by block", second(lambda block: [block]), (Reads, Calls)
    yield "fully_shard by layer", second(lambda block: [block.qkv, block.proj]), (Calls,)
    for original in (False, True):
        yield f"FSDP by block, {original}", first({Reads, Calls}, original), (Reads, Calls)
        yield f"FSDP by layer, {original}", first({nn.Linear}, original), (Calls,)


def _worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    failures = []
    for name, wrap, blocks in ways():
        for block in blocks:
            try:
                if not torch.allclose(losses(wrap(masked(block))), losses(masked(block)), rtol=1e-4):
                    failures.append(f"{name}, {block.__name__}: other losses")
            except Exception as error:
                failures.append(f"{name}, {block.__name__}: {error}")
            dist.barrier()
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_masked_models_train_alike_under_sharding(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    in_two_processes(_worker, port, str(tmp_path))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [[], []]
