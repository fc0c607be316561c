"""`Project` on what is used many times or in part: recurrent layers over all their steps, experts one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import sao_prune
from sao_prune import Project
from sao_prune.algorithms.recurrence import recurrent, recurrent_uses

from .cases import ALL
from .test_project import applied, correlated
from .test_untouched import same, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
KINDS = [nn.RNN, nn.GRU, nn.LSTM]


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, **options):
        super().__init__()
        self.layers, self.packed = kind(6, 8, **options), packed

    def forward(self, x):
        if not self.packed:
            return self.layers(x)[0]
        lengths = torch.arange(len(x)) % x.shape[1] + 1
        first = self.layers.batch_first
        x = x if first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        return pad_packed_sequence(self.layers(packed)[0], batch_first=first)[0]


def by_hand(kind, layer, x, h, c):
    """One step of a layer with one direction: what its matrices multiply is `x` and `h`."""
    cell = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}[kind](x.shape[1], h.shape[1])
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).copy_(getattr(layer, f"{name}_l0"))
        return cell(x, (h, c)) if kind is nn.LSTM else (cell(x, h), c)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_see_the_inputs_and_the_states_before_every_step(kind):
    torch.manual_seed(0)
    layer, x, h = kind(6, 8), torch.randn(4, 3, 6), torch.randn(1, 3, 8)
    state = (h, torch.randn(1, 3, 8)) if kind is nn.LSTM else h
    func = {nn.RNN: torch.rnn_tanh, nn.GRU: torch.gru, nn.LSTM: torch.lstm}[kind]
    call = (x, state, layer._flat_weights, True, 1, 0.0, False, False, False)
    assert list(recurrent(func, call)) == layer._flat_weights
    inputs, states = recurrent_uses(func, call)
    assert (inputs.key, states.key) == (id(layer.weight_ih_l0), id(layer.weight_hh_l0))
    assert inputs.bias is layer.bias_ih_l0
    assert states.bias is layer.bias_hh_l0
    assert len(inputs.inputs) == len(states.inputs) == len(layer.weight_ih_l0) // 8
    now, cell = h[0], state[1][0] if kind is nn.LSTM else None
    for step in range(4):
        assert torch.equal(inputs.inputs[0][step], x[step])
        assert torch.allclose(states.inputs[-1][step], now, atol=1e-6)
        now, cell = by_hand(kind, layer, x[step], now, cell)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_the_sequences_that_they_pack(kind, options):
    """Of each matrix the same inputs, the other way round too, whatever the layout."""
    torch.manual_seed(0)
    layer, lengths = kind(6, 8, **options), torch.tensor([4, 1, 3])
    x = torch.randn(3, 4, 6)
    seen = {}
    for packed in (True, False):
        for number, length in enumerate(lengths.tolist()):
            one = x[number : number + 1, :length]
            one = one if layer.batch_first else one.transpose(0, 1)
            if packed:
                everything = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                if number:
                    continue
                rows = _rows(layer, everything)
            else:
                rows = _rows(layer, one)
            for key, found in rows.items():
                seen.setdefault((packed, key), []).append(found)
    for name in (n for n, _ in layer.named_parameters() if n.startswith("weight")):
        both = [torch.cat(seen[packed, name]) for packed in (True, False)]
        order = [rows[rows[:, 0].argsort()] for rows in both]
        assert torch.allclose(*order, atol=1e-5)


def _rows(layer, x):
    """What every matrix of a layer multiplies."""
    names, found = {id(p): n for n, p in layer.named_parameters()}, {}

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if recurrent(func, args):
                for use in recurrent_uses(func, args):
                    found[names[use.key]] = use.inputs[0].reshape(-1, use.inputs[0].shape[-1])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Look():
        layer(x)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False, "batch_first": True},
        {"packed": True, "bidirectional": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_are_fitted_matrix_by_matrix(kind, options):
    torch.manual_seed(0)
    net, x = Recurrent(kind, **options), correlated(40, 0, 5, 6) / 2
    errors = {}
    for values in ("keep", "least_squares"):
        model, report = applied(net, x, 2, values=values, topology="ramanujan")
        errors[values] = float(F.mse_loss(model(x), net(x)).detach())
        for record in report.pruned:
            assert record.fidelity.error is not None
            assert record.fidelity.error <= record.fidelity.error_kept + 1e-6
            assert not record.note.endswith("kept")
    assert len(report.pruned) == len([n for n, _ in net.named_parameters() if "weight" in n])
    assert errors["least_squares"] < errors["keep"]


def test_recurrent_weights_made_of_blocks_are_recovered():
    torch.manual_seed(0)
    net, x = Recurrent(nn.LSTM, batch_first=True), correlated(40, 0, 5, 6)
    masked, _ = applied(net, x, 2, values="keep", correct=False)
    sao_prune.remove(masked)
    again, report = applied(masked, x, 2)
    assert [r.fidelity.error for r in report.pruned] == pytest.approx([0, 0], abs=1e-6)
    assert torch.allclose(again(x), masked(x), atol=1e-5)


def test_projections_of_an_lstm_keep_their_values_and_it_is_said():
    net, x = Recurrent(nn.LSTM, proj_size=4), correlated(20, 0, 5, 6)
    _, report = applied(net, x, 2)
    notes = {r.name: r.note for r in report.pruned}
    assert "is not seen, so its values are kept" in notes["layers.weight_hr_l0"]
    assert "kept" not in notes["layers.weight_hh_l0"]


class SomeExperts(nn.Module):
    """Each example goes to the expert that a gate names; `how` the experts compute is one of four ways."""

    def __init__(self, how, count=3):
        super().__init__()
        self.how, self.is_transposed = how, how in ("product", "all")
        self.weight = nn.Parameter(torch.randn((count, 6, 8) if self.is_transposed else (count, 8, 6)) / 2)

    def forward(self, x):
        if self.how == "all":
            return torch.bmm(x.expand(len(self.weight), *x.shape), self.weight).tanh().mean(0)
        if self.how == "einsum":
            return torch.einsum("bi,eoi->bo", x, self.weight)
        chosen, y = (x[:, 0] > x[:, 1]).long(), x.new_zeros(len(x), 8)
        for number in chosen.unique():
            mine, expert = x[chosen == number], self.weight[number]
            y[chosen == number] = F.linear(mine, expert) if self.how == "linear" else mine @ expert
        return y


class Experts(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.experts, self.out = SomeExperts(how), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.experts(x)))


@pytest.mark.parametrize("how", ["linear", "product", "all"])
def test_experts_are_fitted_one_by_one(how):
    torch.manual_seed(0)
    net, x = Experts(how), correlated(120, 0, 6)
    errors = {}
    for values in ("keep", "least_squares"):
        model, report = applied(net, x, 2, values=values, topology="ramanujan", exclude=["out"], readout=False)
        errors[values] = float(F.mse_loss(model(x), net(x)).detach())
        record = report.layers[0]
        assert record.fidelity.error <= record.fidelity.error_kept
    assert errors["least_squares"] < 0.8 * errors["keep"]
    unused = "never reach 1 of 3 matrices"
    assert (unused in record.note) == (how != "all")
    if how != "all":
        kept = net.experts.weight[2] * model.experts.weight_mask[2]
        assert torch.equal(model.experts.weight[2], kept)


def test_an_expert_is_fitted_to_the_examples_that_come_to_it():
    """By hand: the least squares of one expert's blocks on its own rows."""
    torch.manual_seed(0)
    net, x = Experts("linear").double(), correlated(200, 0, 6).double()
    model, _ = applied(net, x, 2, topology="interleaved", ridge=1e-9, exclude=["out"])
    mine = x[x[:, 0] > x[:, 1]]
    for row in range(8):
        columns = model.experts.weight_mask[1, row].nonzero().flatten()
        wanted = torch.linalg.lstsq(mine[:, columns], mine @ net.experts.weight[1, row, :, None]).solution.flatten()
        assert torch.allclose(model.experts.weight[1, row, columns], wanted, atol=1e-5)


def test_what_is_not_seen_is_said_and_not_called_unreached():
    torch.manual_seed(0)
    _, report = applied(Experts("einsum"), correlated(40, 0, 6), 2, exclude=["out"])
    assert "is not seen, so its values are kept" in report.layers[0].note
    assert report.layers[0].fidelity.error is None


def test_experts_of_transformers_are_reached():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    net = transformers.MixtralModel(config)
    before, implementation = snapshot(net), net.config._experts_implementation
    tokens = torch.randint(0, 40, (24, 8))
    report = sao_prune.apply(net, groups=2, method=Project(inputs={"input_ids": tokens}), seed=0, **ALL)
    assert net.config._experts_implementation == implementation
    assert same(before["modes"], [m.training for m in net.modules()])
    experts = [r for r in report.pruned if "experts" in r.name]
    assert len(experts) == 2
    for record in experts:
        assert record.fidelity.error < record.fidelity.error_kept


def test_schedules_split_recurrent_layers_and_experts():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.experts = nn.GRU(6, 8, batch_first=True), nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            x = self.layers(x)[0][:, -1]
            return F.linear(x, self.experts[0]) + F.linear(x, self.experts[1])

    torch.manual_seed(0)
    net, x = Both(), correlated(60, 0, 4, 6)
    once = copy.deepcopy(net)
    over = sao_prune.Schedule(1, 2, 2, "linear")
    pruner = sao_prune.schedule(net, Project(inputs=x), groups=4, over=over, seed=0, **ALL)
    groups = []
    for _ in range(2):
        groups.append({r.groups for r in pruner.step().pruned})
    assert groups == [{2}, {4}]
    report = sao_prune.apply(once, groups=4, method=Project(inputs=x), seed=0, **ALL)
    assert [r.nnz for r in report.pruned] == [r.nnz for r in pruner.report.pruned]


class Kept(nn.Module):
    """A layer that keeps its values, in front of a batch norm and a linear layer."""

    def __init__(self, first):
        super().__init__()
        self.first, self.norm, self.out = first, nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        if isinstance(self.first, nn.GRUCell):
            state = None
            for step in x.unbind(1):
                state = self.first(step, state)
            y = state
        elif isinstance(self.first, nn.ConvTranspose1d):
            y = self.first(x.mT).mean(2)
        else:
            y = torch.einsum("bti,oi->bo", x, self.first.weight)
        return self.out(self.norm(y))


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (nn.GRUCell(6, 8), "recurrent cell"),
        (nn.ConvTranspose1d(6, 8, 3, stride=2), "transposed convolution"),
        (nn.Linear(6, 8, bias=False), "what it multiplies is not seen"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_keeps_its_values_is_converted_before_what_comes_after_it(first, why):
    """Statistics and later layers are those of the converted model, not of one with the whole layer."""
    torch.manual_seed(0)
    net, x = Kept(first).eval(), correlated(80, 0, 4, 6)
    model, report = applied(net, x, 2)
    assert all(why in r.note for r in report.pruned[:-1])
    outputs = []
    model.norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    wanted = net(x)
    given = model.eval()(x)
    assert torch.allclose(model.norm.running_mean, outputs[0].mean(0), atol=1e-4)
    assert torch.allclose(model.norm.running_var, outputs[0].var(0), rtol=1e-3)
    assert torch.allclose(given.mean(0), wanted.mean(0), atol=1e-4)
    error = (given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.pruned[-1].fidelity.error == pytest.approx(error.item(), rel=1e-2)


@pytest.mark.parametrize("how", ["T", "mT", "t", "linear", "addmm"])
def test_products_with_a_transposed_weight_are_linear_layers(how):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            weight, bias = self.one.weight, self.one.bias
            if how == "linear":
                y = self.one(x)
            elif how == "addmm":
                y = torch.addmm(bias, x, weight.t())
            else:
                y = x @ (weight.t() if how == "t" else getattr(weight, how)) + bias
            return self.two(torch.tanh(y))

    torch.manual_seed(0)
    net, x = Product(), correlated(60, 0, 6)
    model, report = applied(net, x, 2, topology="interleaved", correct=False)
    assert all(r.fidelity.error is not None for r in report.pruned)
    wanted = net.one(x) - net.one.bias
    given = x @ model.one.weight.T
    error = (given - wanted).square().sum() / wanted.square().sum()
    assert report.pruned[0].fidelity.error == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("how", ["product", "linear", "addmm"])
def test_a_square_weight_that_is_used_the_other_way_round_is_not_fitted(how):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

        def forward(self, x):
            if how == "linear":
                return self.two(F.linear(x, self.one.weight.t()))
            return self.two(x @ self.one.weight if how == "product" else torch.addmm(x, x, self.one.weight))

    torch.manual_seed(0)
    net = Turned()
    model, report = applied(net, correlated(60, 0, 6), 2)
    assert "what it multiplies is not seen" in report.pruned[0].note
    assert torch.equal(model.one.weight, net.one.weight * model.one.weight_mask)


def test_weights_that_are_converted_on_the_way_are_still_seen():
    """Casts to what a weight is already, views of all of it and questions about it are no uses."""

    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            weight = self.one.weight
            assert weight.size(0) == weight.shape[0] == weight.numel() // 6
            x = F.linear(x.to(weight.dtype), weight.to(x.dtype), self.one.bias)
            return self.two(x.type_as(self.two.weight))

    _, report = applied(Careful(), correlated(40, 0, 6), 2)
    assert all(r.fidelity.error is not None for r in report.pruned)


class Ways(nn.Module):
    """A fork whose way the data decide, and layers behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.forks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        large = bool(y[:, 0].abs().max() > 15)
        for number, layer in enumerate(self.forks):
            # The whole model goes through the first and the last of them, one with blocks through the others.
            if large != (number == 1):
                y = y + layer(y) / 10
        return self.last(torch.tanh(y))


@pytest.mark.parametrize("together", [True, False])
def test_models_that_take_other_ways_meet_again(together):
    """What is behind a fork is fitted to what it gave in the whole model, whatever ways both took."""
    torch.manual_seed(0)
    net, x = Ways(), correlated(60, 0, 6)
    x[:, 5] = 3 - torch.arange(60) % 2 * 6
    with torch.no_grad():
        # The first output reads only the last input, of which others say nothing: interleaved blocks take it away.
        net.first.weight[0] = torch.tensor([0, 0, 0, 0, 0, 10])
    wanted = net(x)
    inputs = x if together else [x[:20], {"x": x[20:]}]
    model, report = applied(net, inputs, 2, topology="interleaved", readout=False)
    assert (model.first(x)[:, 0].abs().max() > 15) != (net.first(x)[:, 0].abs().max() > 15)
    error = (model(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    last = next(r for r in report.pruned if r.name == "last.weight")
    assert last.fidelity.error == pytest.approx(error.item(), rel=1e-2)
    assert torch.allclose(model(x).mean(0), wanted.mean(0), atol=1e-3)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_goes_on_with_every_layer_if_somebody_sees_it(terminal, monkeypatch, capsys):
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.layers, self.up = SomeExperts("linear"), nn.LSTM(8, 8), nn.ConvTranspose1d(8, 8, 3)

        def forward(self, x):
            return self.up(self.layers(self.experts(x))[0].T)

    from rich.console import Console
    from rich.progress import Progress

    counted = []
    advance = Progress.advance
    monkeypatch.setattr(Console, "is_terminal", terminal)
    monkeypatch.setattr(Progress, "advance", lambda bar, task: (counted.append(bar.tasks[0].total), advance(bar, task)))
    _, report = applied(All(), correlated(40, 0, 6), 2)
    assert len(report.pruned) == 4
    assert counted == ([4] * 4 if terminal else [])
    printed = capsys.readouterr()
    assert ("converting layers" in printed.err) == terminal
    assert not printed.out
