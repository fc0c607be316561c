"""Shared by the tests of layers with several weights: the law that compact computes what masked does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sao_prune
from sao_prune.algorithms import Draw
from sao_prune.discovery import Selection, walk
from sao_prune.prune import MaskPruning, attach_all
from sao_prune.topology import BlockTopology


class Around(nn.Module):
    """A model that consists of one layer, named ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.layer(*inputs, **options)


def pruned(layer: nn.Module, seed: int = 0, topology: str = "interleaved", **amount: Any) -> Around:
    """A layer in double precision, all of whose weights are pruned; the values are all drawn."""
    model = Around(layer).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    ends = {"skip_first": False, "skip_last": False}
    if topology == "apart":
        # Every matrix of a weight with sets of its own.
        modules, generator = dict(model.named_modules()), torch.Generator().manual_seed(seed)
        draws = []
        for weight in walk(model, Selection(**ends)):
            sizes = [(*weight.matrix, amount["groups"])] * weight.parts
            draws.append(Draw(weight, tuple(_scattered(*size, generator) for size in sizes)))
        attach_all(modules, draws, MaskPruning)
        return model
    sao_prune.apply(model, seed=seed, method=sao_prune.SAO(topology=topology), **ends, **amount)
    return model


def _scattered(rows: int, cols: int, groups: int, generator: torch.Generator) -> BlockTopology:
    sets = (torch.arange(size)[torch.randperm(size, generator=generator)] % groups for size in (rows, cols))
    return BlockTopology(*sets)


def derivatives(model: nn.Module, run: Callable[[nn.Module], Any], inputs: list[Tensor]) -> tuple[list, dict]:
    """All tensors that a run returns, and the gradients of a sum of them, masked weights' by the dense weight."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = [y for y in tree_leaves(run(model, *leaves)) if isinstance(y, Tensor)]  # type: ignore[call-arg]
    total = sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in results)
    total.backward()
    found = {f"input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {name: p.grad for name, p in model.named_parameters()}
    return results, found


def check_law(masked: nn.Module, run: Callable[..., Any], inputs: list[Tensor]) -> nn.Module:
    """Compact computes what the masked model does, gradients too, and expands to it; returns the compact model."""
    compact = copy.deepcopy(masked)
    report = sao_prune.compact(compact)
    assert not report.skipped, [record.reason for record in report.skipped]
    expected, gradients = derivatives(masked, run, inputs)
    results, own = derivatives(compact, run, inputs)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)
    expanded = copy.deepcopy(compact)
    for parameter, name in [(p, n) for n, p in expanded.named_parameters()]:
        parameter.data = own[name] if own[name] is not None else torch.zeros_like(parameter)
    sao_prune.expand(expanded, "masked")
    # Blocks of gradients, put where the blocks of weights stand.
    dense = dict(expanded.named_parameters())
    masks = dict(masked.named_buffers())
    for name, gradient in gradients.items():
        if name.startswith("input"):
            found = own[name]
        else:
            found = dense[name]
            mask = masks.get(name.removesuffix("_orig") + "_mask")
            gradient = torch.zeros_like(found) if gradient is None else gradient if mask is None else gradient * mask
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)
    again = copy.deepcopy(compact)
    sao_prune.expand(again)
    state = masked.state_dict()
    assert set(again.state_dict()) == set(state)
    for key, value in again.state_dict().items():
        mask = state.get(key.removesuffix("_orig") + "_mask")
        assert torch.equal(value, state[key] * mask if mask is not None and key.endswith("_orig") else state[key]), key
    torch.testing.assert_close(
        [y for y in tree_leaves(run(again, *inputs)) if isinstance(y, Tensor)], expected, rtol=1e-12, atol=1e-12
    )
    return compact


def check_states(compact: nn.Module, fresh: Callable[[], nn.Module], path: Any) -> None:
    """A compact state goes into a dense model, a dense and a masked one into a compact model."""
    file = sao_prune.save(compact, path / "compact.safetensors")
    loaded = fresh()
    sao_prune.load(loaded, file)
    state = compact.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    for form in ("masked", "baked"):
        other = copy.deepcopy(compact)
        sao_prune.expand(other, form)
        file = sao_prune.save(other, path / f"{form}.pt")
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.zero_()
        sao_prune.load(loaded, file)
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
