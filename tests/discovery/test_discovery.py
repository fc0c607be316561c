"""Where pruning goes, and why it does not go elsewhere."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import sao_prune
from sao_prune.discovery import Selection, walk

ALL = {"skip_first": False, "skip_last": False}


def table(model, **options):
    return {w.name: w.reason for w in walk(model, Selection(**options))}


def test_first_and_last_of_a_plain_model():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    assert table(net) == {"0.weight": "first layer", "2.weight": None, "4.weight": "last layer"}
    assert table(net, skip_first=False) == {"0.weight": None, "2.weight": None, "4.weight": "last layer"}


def test_every_encoder_of_the_image_starts_with_a_first_layer():
    net = nn.ModuleDict(
        {name: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)) for name in ("features", "context")}
    )
    reasons = table(net)
    assert reasons["features.0.weight"] == reasons["context.0.weight"] == "first layer"
    assert reasons["features.1.weight"] is None
    assert set(table(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)))).values()) == {
        "first layer",
        None,
        "last layer",
    }


@pytest.mark.parametrize(
    ("module", "tensor", "parts", "matrix", "kernel"),
    [
        (nn.Linear(6, 4), "weight", 1, (4, 6), ()),
        (nn.Conv1d(6, 4, 5), "weight", 1, (4, 6), (5,)),
        (nn.Conv3d(6, 4, (1, 2, 3)), "weight", 1, (4, 6), (1, 2, 3)),
        (nn.Conv2d(6, 4, 3, groups=2), "weight", 2, (2, 3), (3, 3)),
        (nn.ConvTranspose2d(6, 4, 3), "weight", 1, (4, 6), (3, 3)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), "weight", 2, (2, 3), (3, 3)),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", 3, (8, 8), ()),
        (nn.MultiheadAttention(8, 2, kdim=4), "k_proj_weight", 1, (8, 4), ()),
        (nn.LSTM(5, 7), "weight_ih_l0", 4, (7, 5), ()),
        (nn.GRU(5, 7), "weight_hh_l0", 3, (7, 7), ()),
        (nn.RNN(5, 7), "weight_hh_l0", 1, (7, 7), ()),
        (nn.LSTM(5, 7, proj_size=3), "weight_hr_l0", 1, (3, 7), ()),
        (nn.LSTMCell(5, 7), "weight_hh", 4, (7, 7), ()),
        (nn.GRUCell(5, 7), "weight_ih", 3, (7, 5), ()),
    ],
)
def test_every_kind_of_layer(module, tensor, parts, matrix, kernel):
    (weight,) = [w for w in walk(module, Selection(**ALL)) if w.tensor == tensor]
    assert (weight.parts, weight.matrix, weight.kernel, weight.reason) == (parts, matrix, kernel, None)
    view = weight.matrices(getattr(module, tensor))
    assert tuple(view.shape) == (parts, *matrix, *kernel)


def test_reasons():
    net = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "tiny": nn.Linear(8, 1),
            "lazy": nn.LazyLinear(4),
            "parametrized": parametrizations.orthogonal(nn.Linear(4, 4)),
            "spectral": spectral_norm(nn.Linear(4, 4)),
        }
    )
    reasons = {w.module: w.reason for w in walk(net, Selection(**ALL))}
    assert reasons["depthwise"] == "depthwise"
    assert reasons["tiny"] == "too small: 1 x 8"
    assert "lazy" in reasons["lazy"]
    assert "computed from other parameters" in reasons["parametrized"]
    assert "computed from other parameters" in reasons["spectral"]


def test_tied_weights_come_once_with_their_aliases():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    (weight,) = walk(nn.ModuleList([a, b]), Selection(**ALL))
    assert (weight.module, weight.aliases) == ("0", (("1", "weight"),))


def test_execution_order_needs_an_example_input():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(4, 2)
            self.a = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.b.weight)

    net = Backwards().train()
    assert [w.module for w in walk(net)] == ["b", "a", "unused"]
    assert [w.module for w in walk(net, Selection(example_input=torch.randn(1, 4)))] == ["a", "b", "unused"]
    assert net.training
    with pytest.raises(ValueError, match="does not run on the example input"):
        walk(net, Selection(example_input=torch.randn(1, 5)))


class Heads(nn.Module):
    """Layers in another order than they are called in, and heads that only training has."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 4)
        self.second = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.first = nn.Linear(8, 8)
        self.inp = nn.Linear(8, 8)
        self.helper = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def forward(self, x):
        x = self.first(self.inp(x))
        x = self.second(self.attention(x, x, x)[0])
        return (self.out(x), self.helper(x)) if self.training else self.out(x)


@pytest.mark.parametrize("masked", [(), ("second",), ("first", "attention"), ("out", "helper.0")])
def test_ends_and_order_are_those_of_what_runs_whatever_is_pruned_already(masked):
    x = torch.randn(3, 2, 8)
    model = Heads()
    if masked:
        sao_prune.apply(model, groups=2, include=[f"{name}*" for name in masked], seed=0, **ALL)
    found = walk(model, Selection(example_input=x))
    assert [w.name for w in found[:6]] == [
        "inp.weight", "first.weight", "attention.in_proj_weight", "attention.out_proj.weight", "second.weight",
        "out.weight",
    ]  # fmt: skip
    pruned = {name for name in model.state_dict() if name.endswith("_orig")}
    reasons = {w.name: w.reason for w in found if f"{w.name}_orig" not in pruned}
    assert reasons.pop("inp.weight") == "first layer"
    assert reasons.pop("out.weight", "last layer") == "last layer"
    assert set(reasons.values()) == {None}


def test_auxiliary_classifiers_of_torchvision_leave_the_real_one_the_last():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.googlenet(num_classes=10, init_weights=False)
    for options in ({}, {"example_input": torch.randn(1, 3, 32, 32)}):
        last = {w.name for w in walk(model, Selection(**options)) if w.reason == "last layer"}
        assert last == {"aux1.fc2.weight", "aux2.fc2.weight", "fc.weight"}


def test_patterns_and_predicates():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert table(net, include=["[12]"], **ALL) == {
        "0.weight": "not included",
        "1.weight": None,
        "2.weight": None,
        "3.weight": "not included",
    }
    assert table(net, exclude=lambda name, module: name == "1", **ALL)["1.weight"] == "excluded"
    with pytest.raises(ValueError, match="exclude pattern 'x' matches none of the 4 layers: 0, 1, 2, 3"):
        walk(net, Selection(exclude=["x"]))
    with pytest.raises(TypeError, match="list of glob patterns"):
        walk(net, Selection(exclude="0"))


def test_raw_parameters_are_taken_only_by_name():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(6, 4))
            self.fc = nn.Linear(4, 4)

    assert [w.name for w in walk(Raw())] == ["fc.weight"]
    taken = walk(Raw(), Selection(include=["mix"], **ALL))
    assert [(w.name, w.kind, w.reason) for w in taken] == [
        ("fc.weight", "Linear", "not included"),
        ("mix", "Parameter", None),
    ]


def test_no_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        walk("resnet50")


def test_timm_names_its_ends():
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet")
    reasons = {w.module: w.reason for w in walk(net)}
    assert reasons["conv1.0" if "conv1.0" in reasons else "conv1"] == "first layer"
    assert reasons["fc"] == "last layer"
    assert sum(r in ("first layer", "last layer") for r in reasons.values()) == 2


def test_torchvision_vit_attention_is_found():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        net = torchvision.models.vit_b_16()
    found = {w.name: w for w in walk(net)}
    assert found["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].parts == 3
    assert found["conv_proj.weight"].reason == "first layer"
    assert found["heads.head.weight"].reason == "last layer"


def test_ends_by_any_name_of_a_tied_weight():
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    net[3].weight = net[1].weight
    assert table(net) == {"0.weight": "first layer", "1.weight": "last layer", "2.weight": None}


def test_of_a_recurrent_stack_only_the_ends_are_ends():
    net = nn.Sequential(nn.LSTM(8, 8, num_layers=3), nn.Linear(8, 9))
    reasons = table(net)
    assert [n for n, r in reasons.items() if r == "first layer"] == ["0.weight_ih_l0"]
    assert [n for n, r in reasons.items() if r == "last layer"] == ["1.weight"]
    assert sum(r is None for r in reasons.values()) == 5


def test_wildcards_for_layers_do_not_take_raw_parameters():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))
            self.mixes = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    assert all("table" not in name for name in table(Raw(), include=["*"]))
    assert table(Raw(), include=["*"])["layers.2.weight"] == "last layer"
    assert table(Raw(), include=["mixes.*", "table"])["mixes.1"] is None


def test_walking_leaves_the_global_generator_alone():
    class Draws(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.rand(1))

    state = torch.get_rng_state()
    net = Draws(4, 4)
    torch.set_rng_state(state)
    walk(net, Selection(example_input=torch.ones(1, 4)))
    assert torch.equal(torch.get_rng_state(), state)
