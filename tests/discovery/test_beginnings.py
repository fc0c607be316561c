"""Where a model begins: with an embedding, an image, a layer that has no shape yet."""

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.discovery import Selection, walk


def first(model, **options):
    return [w.name for w in walk(model, Selection(**options)) if w.reason == "first layer"]


class Text(nn.Module):
    """A language model whose modules are registered in the reverse of their use."""

    def __init__(self, backwards):
        super().__init__()
        parts = {
            "embed": nn.Embedding(10, 8),
            "positions": nn.Embedding(4, 8),
            "q": nn.Linear(8, 8),
            "mlp": nn.Linear(8, 8),
            "head": nn.Linear(8, 10),
        }
        for name in reversed(parts) if backwards else parts:
            setattr(self, name, parts[name])

    def forward(self, x):
        hidden = self.positions(torch.arange(x.shape[1])) + self.embed(x)
        return self.head(self.mlp(self.q(hidden)))


def test_the_embedding_is_the_first_layer():
    model = Text(backwards=False)
    assert first(model) == []
    assert {w.name: w.reason for w in walk(model)} == {
        "q.weight": None,
        "mlp.weight": None,
        "head.weight": "last layer",
    }
    backwards = Text(backwards=True)
    assert first(backwards) == ["head.weight"]
    tokens = torch.zeros(1, 4, dtype=torch.long)
    reasons = {w.name: w.reason for w in walk(backwards, Selection(example_input=tokens))}
    assert reasons == {"q.weight": None, "mlp.weight": None, "head.weight": "last layer"}


def test_a_projection_before_positions_is_first_all_the_same():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Embedding(4, 8)
            self.patch = nn.Linear(3, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(self.patch(x) + self.pos_embed.weight))

    assert first(Patches()) == first(Patches(), example_input=torch.ones(2, 4, 3)) == ["patch.weight"]


def test_an_embedding_inside_is_no_beginning():
    assert first(nn.Sequential(nn.Linear(8, 8), nn.Embedding(3, 8), nn.Linear(8, 8))) == ["0.weight"]


def test_beside_an_embedding_the_convolutions_that_read_images_are_first():
    both = nn.ModuleDict(
        {
            "words": nn.Embedding(10, 8),
            "q": nn.Linear(8, 8),
            "patch": nn.Conv2d(3, 8, 4),
            "conv": nn.Conv2d(8, 8, 3),
            "head": nn.Linear(8, 8),
        }
    )
    assert first(both) == ["patch.weight"]


def test_lazy_layers_get_their_shapes_from_the_example_input():
    def lazy():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(16), nn.Linear(16, 4)
        )

    x = torch.randn(2, 3, 6, 6)
    net = lazy().train()
    with pytest.raises(ValueError, match="lazy"):
        sao_prune.plan(net, 0.5)
    plan = sao_prune.plan(net, 0.5, example_input=x)
    assert isinstance(net[3], nn.LazyLinear)
    assert [layer.name for layer in plan.pruned] == ["3.weight"]
    assert plan.parameters == sum(p.numel() for p in nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8),
        nn.Linear(128, 16), nn.Linear(16, 4)).parameters())  # fmt: skip
    report = sao_prune.apply(net, 0.5, example_input=x, seed=0)
    assert (report.layers, report.parameters) == (plan.layers, plan.parameters)
    assert type(net[3]) is nn.Linear
    assert all(module.training for module in net.modules())
    assert net[1].num_batches_tracked == 0
    net(x).sum().backward()
    calls = []
    unknown = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.LazyLinear(8), nn.Linear(8, 4))
    unknown.register_forward_pre_hook(lambda *_: calls.append(1))
    assert len(sao_prune.apply(unknown, groups=4, seed=0).pruned) == 2
    assert isinstance(unknown[3], nn.LazyLinear)
    reasons = {r.name: r.reason for r in sao_prune.compact(unknown).skipped}
    assert "lazy" in reasons["3"]
    assert not calls
    broken = lazy()
    with pytest.raises(ValueError, match="does not run on the example input"):
        sao_prune.apply(broken, 0.5, example_input=torch.randn(2, 3, 1, 1))
    with pytest.raises(ValueError, match="matches none"):
        sao_prune.apply(broken, 0.5, example_input=x, exclude=["nothing"])
    assert isinstance(broken[0], nn.LazyConv2d)
    assert isinstance(broken[3], nn.LazyLinear)


class _Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))

    def forward(self, x):
        return self.layers(x.mul_(2))


def test_an_example_that_the_model_writes_to_stays():
    model, x = _Writing(), torch.ones(2, 16)
    sao_prune.plan(model, groups=4, example_input=x)
    sao_prune.apply(model, groups=4, example_input=x, seed=0)
    assert torch.equal(x, torch.ones(2, 16))
