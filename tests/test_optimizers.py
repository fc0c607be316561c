"""docs/optimizers.md: its snippet runs, and what it says of Muon holds."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune

PAGE = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@pytest.fixture
def page():
    pytest.importorskip("timm")
    namespace: dict = {}
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    if not hasattr(torch.optim, "Muon"):
        snippet = snippet.partition("optimizers = ")[0]
    exec(compile(snippet, "docs/optimizers.md", "exec"), namespace)
    return namespace


def step(model, optimizers):
    model(torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


@needs_muon
def test_the_snippet_trains_and_zeros_stay_zero(page):
    model, matrices = page["model"], page["matrices"]
    masks = {n: b for n, b in model.named_buffers() if n.endswith("_mask")}
    assert len(matrices) == len(masks) > 10
    before = [p.detach().clone() for p in matrices]
    step(model, page["optimizers"])
    assert all(not torch.equal(old, new) for old, new in zip(before, matrices))
    parameters = dict(model.named_parameters())
    assert not any(parameters[f"{n[:-5]}_orig"][mask == 0].any() for n, mask in masks.items())


@needs_muon
def test_of_a_compact_model_nothing_goes_to_muon(page):
    model = page["model"]
    sao_prune.compact(model)
    matrices, others = page["split"](model)
    compacted = {name for name, _ in model.named_parameters() if name.endswith("blocks")}
    assert compacted
    assert not {id(p) for p in matrices} & {id(p) for n, p in model.named_parameters() if n in compacted}
    step(model, [torch.optim.AdamW(others)])


@needs_muon
@pytest.mark.parametrize("shape", [(64, 64), (48, 50), (30, 96)])
def test_muon_orthogonalises_block_by_block(shape):
    torch.manual_seed(0)
    layer = sao_prune.prune.ramanujan(nn.Linear(shape[1], shape[0], bias=False), sparsity=0.75, seed=0)
    mask, before = layer.weight_mask, layer.weight_orig.detach().clone()
    optimizer = torch.optim.Muon([layer.weight_orig], lr=1.0, momentum=0.0, weight_decay=0.0)
    layer(torch.randn(256, shape[1])).square().mean().backward()
    optimizer.step()
    update = before - layer.weight_orig.detach()
    assert not update[mask == 0].any()
    # Five Newton-Schulz steps bring most singular values near one and no more.
    values = torch.linalg.svdvals(update) / max(1, (shape[0] / shape[1]) ** 0.5)
    assert values.max() < 1.3
    assert values.median() > 0.5


def test_timms_muon_keeps_zeros_of_convolutions_and_takes_the_groups(page):
    optim = pytest.importorskip("timm.optim")
    if not hasattr(optim, "Muon"):
        pytest.skip("this timm has no Muon")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    sao_prune.apply(net, 0.75, seed=0)
    optimizer = optim.Muon(net.parameters(), lr=0.1)
    before = net[1].weight_orig.detach().clone()
    net(torch.randn(2, 8, 9, 9)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, net[1].weight_orig)
    assert not net[1].weight_orig[net[1].weight_mask == 0].any()
    sao_prune.compact(net)
    matrices, others = page["split"](net)
    assert not matrices
    optim.Muon([{"params": others, "use_fallback": True}], lr=0.1)
