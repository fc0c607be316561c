"""From trained weights to blocks: what is recovered, what is never worse, and what stays as it was."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import Project
from sao_prune.algorithms.rehearsal import trial
from sao_prune.topology import BlockTopology, interleaved, ramanujan
from sao_prune.weights import refitted

from .cases import ALL, digits, mlp
from .test_untouched import Mixed, images, same, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, (3, 1), padding="same", dilation=2, groups=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


def correlated(n=200, seed=0, *shape):
    """Examples whose entries have means, and say much about each other."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.Size(shape).numel()
    hidden = torch.randn(n, max(width // 3, 1), generator=generator) @ torch.randn(
        max(width // 3, 1), width, generator=generator
    )
    return (hidden + 0.1 * torch.randn(n, width, generator=generator) + 1).view(n, *shape)


def applied(model, x, groups=4, seed=0, **options):
    model = copy.deepcopy(model)
    chosen = {key: options.pop(key) for key in ("skip_first", "skip_last", "exclude") if key in options}
    report = sao_prune.apply(model, groups=groups, method=Project(inputs=x, **options), seed=seed, **{**ALL, **chosen})
    return model, report


@pytest.mark.parametrize("values", ["keep", "least_squares"])
def test_a_weight_that_is_made_of_blocks_is_recovered_without_error(values):
    net = mlp(24, 24, 32, act=nn.ReLU)
    with torch.no_grad():
        net[0].weight.mul_(ramanujan(24, 24, 4, torch.Generator().manual_seed(1)).mask())
        net[2].weight.mul_(ramanujan(32, 24, 4, torch.Generator().manual_seed(2)).mask())
    x = correlated(100, 0, 24)
    model, report = applied(net, x, values=values)
    assert [(r.fidelity.energy, r.fidelity.error) for r in report.pruned] == [(1.0, 0.0)] * 2
    assert torch.equal(model(x), net(x))


def test_a_convolution_that_is_made_of_blocks_is_recovered_too():
    net = ConvNet().eval()
    with torch.no_grad():
        net.conv.weight.mul_(ramanujan(16, 8, 4, torch.Generator().manual_seed(1)).mask()[..., None, None])
    x = torch.randn(20, 3, 8, 8)
    model, _ = applied(net, x, exclude=["stem", "grouped", "head"], correct=False)
    assert torch.equal(model.eval()(x), net(x))


@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 6), st.integers(1, 60), st.booleans(), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_least_squares_is_never_worse_than_the_values_kept(rows, cols, groups, samples, bias, seed):
    torch.manual_seed(seed)
    net, x = nn.Sequential(nn.Linear(cols, rows, bias=bias)), correlated(samples, seed, cols)
    errors = {}
    for values in ("keep", "least_squares"):
        model, report = applied(net, x, groups, values=values, topology="ramanujan", ridge=0.03)
        errors[values] = float((model(x) - net(x)).detach().square().sum())
        size = (net(x) - net(x).mean(0) if bias else net(x)).square().sum()
        # One sample is its own mean: no error is relative to what does not vary.
        assert not size or report.layers[0].fidelity.error == pytest.approx(
            errors[values] / float(size), rel=1e-2, abs=1e-5
        )
    assert errors["least_squares"] <= errors["keep"] * (1 + 1e-4) + 1e-6


def test_least_squares_is_the_solution_of_the_normal_equations():
    """By hand: block by block ``B = W S[:, C] S[C, C]^-1`` on the centred inputs, and the bias makes up the means."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4)).double(), correlated(50, 0, 6).double()
    model, _ = applied(net, x, 2, topology="interleaved", ridge=1e-9)
    centred, mask = x - x.mean(0), interleaved(4, 6, 2).mask()
    for row in range(4):
        columns = mask[row].nonzero().flatten()
        wanted = torch.linalg.lstsq(centred[:, columns], centred @ net[0].weight[row, :, None]).solution.flatten()
        assert torch.allclose(model[0].weight[row, columns], wanted, atol=1e-5)
    assert torch.allclose(model(x).mean(0), net(x).mean(0), atol=1e-6)


def test_the_mean_of_every_biased_layer_is_kept():
    net, x = ConvNet().eval(), correlated(60, 0, 3, 8, 8)
    model, _ = applied(net, x, exclude=["conv", "grouped", "head"], skip_first=False)
    assert torch.allclose(model.stem(x).mean((0, 2, 3)), net.stem(x).mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("values", ["keep", "least_squares"])
def test_no_layer_drifts_from_the_mean_that_it_had(values):
    """Activations of less spread have other means; the bias of the next layer makes up for them."""
    torch.manual_seed(0)
    net, x = mlp(12, 24, 24, 24, 5, act=nn.ReLU), correlated(200, 0, 12)
    model, _ = applied(net, x, values=values)
    assert not torch.allclose(torch.relu(model[0](x)).mean(0), torch.relu(net[0](x)).mean(0), atol=1e-2)
    for depth in (1, 3, 5, 7):
        assert torch.allclose(model[:depth](x).mean(0), net[:depth](x).mean(0), atol=1e-4)


def test_batch_norm_statistics_are_those_of_the_converted_part():
    net, x = ConvNet().eval(), correlated(60, 0, 3, 8, 8)
    net.norm.running_mean.add_(5)
    model, _ = applied(net, x)
    model.eval()
    out = model.conv(torch.relu(model.stem(x)))
    assert torch.allclose(model.norm.running_mean, out.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model.norm.running_var, out.var((0, 2, 3)), rtol=1e-3)


def test_statistics_before_the_first_converted_layer_stay():
    net, x = ConvNet(), correlated(30, 0, 3, 8, 8)
    model, _ = applied(net, x, exclude=["stem", "conv"])
    assert torch.equal(model.norm.running_mean, net.norm.running_mean)
    model, _ = applied(net, x, correct=False)
    assert torch.equal(model.norm.running_var, net.norm.running_var)
    assert torch.equal(model.stem.bias, net.stem.bias)


def test_each_layer_is_fitted_to_what_it_gives_in_the_whole_model():
    """By hand: inputs from the converted layers before it, targets from the model as it was."""
    torch.manual_seed(0)
    net, x = mlp(12, 12, 12, 12, act=nn.Tanh).double(), correlated(80, 0, 12).double() / 4
    model, report = applied(net, x, topology="interleaved", ridge=1e-12)
    inputs, wanted, mask = model[:4](x).detach(), net[4](net[:4](x)).detach(), interleaved(12, 12, 4).mask()
    inputs, wanted = inputs - inputs.mean(0), wanted - wanted.mean(0)
    for row in range(12):
        columns = mask[row].nonzero().flatten()
        values = torch.linalg.lstsq(inputs[:, columns], wanted[:, row, None]).solution.flatten()
        assert torch.allclose(model[4].weight[row, columns], values, atol=1e-4)
    error = (model(x) - net(x)).square().sum() / wanted.square().sum()
    assert report.pruned[2].fidelity.error == pytest.approx(float(error.detach()), rel=1e-3)


class Branches(nn.Module):
    """Two branches with all that may stand between a layer and the sum: permutations, dropout, layer scale, norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.tokens, self.channels = nn.Linear(6, 6), nn.Linear(5, 5), nn.Linear(6, 6)
        self.scale, self.dropout = nn.Parameter(torch.linspace(-1, 1, 6)), nn.Dropout(0.5)
        self.conv, self.norm = nn.Conv1d(6, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = x + self.dropout(self.tokens(x.transpose(1, 2)).transpose(1, 2))
        x = self.dropout(self.channels(x)) * self.scale + x
        x = x.permute(0, 2, 1)
        x += self.norm(self.conv(torch.relu(x)))
        return x


def test_ends_of_branches_make_up_for_what_the_stream_has_lost():
    torch.manual_seed(0)
    net, x = Branches().eval(), correlated(300, 0, 5, 6)
    net.norm.running_var.fill_(0.3)
    nn.init.uniform_(net.norm.weight, -1, 1)
    ends = {"tokens.weight": (0, 2, 1), "channels.weight": (0, 1, 2), "conv.weight": (0, 1, 2)}
    parameters = dict(net.named_parameters())
    tracer = trial(net, x, [id(parameters[name]) for name in ends])
    outputs = {}
    for name in ends:
        module = net.get_submodule(name.rpartition(".")[0])
        module.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
    before = {"tokens.weight": (stem := torch.tanh(net.stem(x)))}
    net(x)
    before["channels.weight"] = stem + outputs["tokens.weight"].mT
    before["conv.weight"] = (before["channels.weight"] + outputs["channels.weight"] * net.scale).mT
    factors = {"conv.weight": (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt())[:, None]}
    factors["channels.weight"] = net.scale
    for name, order in ends.items():
        sink = tracer.sinks[id(parameters[name])]
        stream = before[name].detach()
        assert torch.allclose(sink.returned(stream), (stream / factors.get(name, 1)).permute(order), atol=1e-5)
        assert (sink.norm == id(net.norm.running_mean)) == (name == "conv.weight")
        assert sink.call is not None
    errors = [
        float(F.mse_loss(applied(net, x, 2, topology=t)[0].eval()(x), net(x)).detach())
        for t in ("ramanujan", "clustered")
    ]
    plain = applied(net, x, 2, topology="ramanujan", values="keep", correct=False)[0]
    assert max(errors) < float(F.mse_loss(plain.eval()(x), net(x)).detach())


def test_a_sum_with_something_made_later_or_of_another_shape_is_no_stream():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.tanh(x)
            late = self.one(x) + torch.tanh(self.two(x))
            return late + self.two(x).mean(0)

    net = Other()
    tracer = trial(net, X[:, :4], [id(net.one.weight), id(net.two.weight)])
    assert [sink.call for sink in tracer.sinks.values()] == [None, None]


@pytest.mark.parametrize("tied", [False, True])
def test_a_last_layer_that_stays_dense_learns_from_the_converted_features(tied):
    torch.manual_seed(0)
    net, x = mlp(12, 24, 24, 4, act=nn.ReLU), correlated(300, 0, 12)
    if tied:
        net.register_module("again", nn.Linear(24, 4))
        net.forward = lambda x: net[:5](x)
        net.again.weight = net[4].weight
    errors = []
    for readout in (False, True):
        model, report = applied(net, x, exclude=["4"], readout=readout)
        errors.append(float(F.mse_loss(model[:5](x), net[:5](x))))
        assert ("4.weight is fitted anew" in report.pruned[-1].note) == (readout and not tied)
        assert torch.equal(model[4].weight, net[4].weight) == (not readout or tied)
    assert errors[1] == errors[0] if tied else errors[1] < 0.8 * errors[0]


def test_too_few_examples_hardly_move_a_last_layer():
    torch.manual_seed(0)
    weight, x = torch.randn(2, 30), torch.randn(20, 30)
    noisy = refitted(weight, [(x, x @ weight.T + torch.randn(20, 2))], centred=True)
    assert (noisy - weight).norm() < 0.03 * weight.norm()
    assert torch.equal(refitted(weight, [(x[:1], x[:1] @ weight.T)], centred=True), weight)
    new = torch.randn(2, 30)
    many = torch.randn(500, 30)
    halves = [(part, part @ new.T) for part in many.split(300)]
    assert torch.allclose(refitted(weight, halves, centred=False), new, atol=1e-2)
    with pytest.raises(ValueError, match="at least one row"):
        refitted(weight, [], centred=False)


def test_a_model_that_writes_into_its_input_is_run_on_a_copy_of_it():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.two(torch.relu(self.one(x.mul_(2))))

    x = X.clone()
    net = Writes()
    _, report = applied(net, x, 2, topology="interleaved")
    assert torch.equal(x, X)
    assert report.pruned[0].fidelity.error <= report.pruned[0].fidelity.error_kept


def test_paths_that_part_are_fitted_by_themselves():
    """A gate that opens for other examples in the converted model: what does not belong together is not compared."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.expert, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            scores = self.gate(x)[:, 0]
            return self.last(self.expert(x[scores > scores.median()])) if len(x) > 2 else self.last(self.expert(x))

    torch.manual_seed(0)
    _, report = applied(Gated(), torch.randn(200, 6), 2, topology="interleaved")
    assert all(r.fidelity.error <= r.fidelity.error_kept + 1e-6 for r in report.pruned)


def test_orthogonal_blocks_have_one_gain_a_matrix():
    model, _ = applied(mlp(16, 16), correlated(80, 0, 16), values="orthogonal")
    values = torch.linalg.svdvals(model[0].weight)
    assert torch.allclose(values, values.mean().expand(16), rtol=1e-4)


def test_patches_are_what_the_convolution_multiplies():
    """The error that the report tells is that of the layer's own outputs, whatever its geometry."""
    for conv in (
        nn.Conv1d(4, 8, 3, stride=2, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 8, (2, 3), stride=(1, 2), padding=(1, 0), groups=2, bias=False),
        nn.Conv3d(4, 8, 2, padding="same", bias=False),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", bias=False),
    ):
        x = torch.randn(6, 4, *[6] * len(conv.kernel_size))
        model, report = applied(nn.Sequential(conv), x, 2)
        error = (model(x) - conv(x)).square().sum() / conv(x).square().sum()
        assert report.layers[0].fidelity.error == pytest.approx(float(error), rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("separate", [False, True])
def test_attention_is_fitted_matrix_by_matrix(separate):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6 if separate else 8)

        def forward(self, x):
            return self.attention(x, x[..., :6] if separate else x, x, need_weights=False)[0]

    net, x = Net(), correlated(300, 0, 8).view(50, 6, 8)
    nn.init.normal_(net.attention.in_proj_bias)
    model, report = applied(net.eval(), x, 2)
    assert len(report.pruned) == (4 if separate else 2)
    for record in report.pruned:
        assert record.fidelity.error < record.fidelity.error_kept
    assert F.mse_loss(model.eval()(x), net(x)) < net(x).var()
    kept, _ = applied(net, x, 2, values="keep", correct=False)
    assert F.mse_loss(model.eval()(x), net(x)) < F.mse_loss(kept.eval()(x), net(x))


def test_all_kinds_of_layers_and_only_what_the_report_names_changes():
    torch.manual_seed(0)
    model, (x, y) = Mixed(), images(12)
    before = snapshot(model)
    report = sao_prune.apply(model, groups=2, method=Project(inputs=x), seed=0)
    notes = {r.name: r.note for r in report.pruned}
    assert "output error" in notes["lstm.weight_ih_l0"]
    assert "output error" in notes["attention.out_proj.weight"]
    assert "2 rows" not in notes["one.weight"]
    assert torch.equal(model.stem.weight, before["state"]["stem.weight"])
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert same([m.training for m in model.modules()], before["modes"])
    F.cross_entropy(model(x), y).backward()


def test_a_layer_that_no_data_reach_is_kept_and_named():
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    net = Detour()
    model, report = applied(net, torch.randn(20, 8), 2)
    assert "never reach" in report.layers[1].note
    assert torch.equal(model.unused.weight, net.unused.weight * model.unused.weight_mask)


def test_few_rows_are_said():
    _, report = applied(mlp(32, 8), torch.randn(3, 32), 2)
    assert "3 rows for blocks of 16 inputs" in report.layers[0].note


X = correlated(24, 0, 6)


class Words(nn.Module):
    """Takes its input by name, and sequences of any length."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, scale=None):
        return self.two(torch.relu(self.one(x if scale is None else x * scale)).mean(-2))


def test_every_kind_of_loader_means_the_same_examples():
    torch.manual_seed(0)
    net = mlp(6, 8, 4, act=nn.ReLU)
    labels = torch.zeros(24)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, labels), batch_size=10)
    forms = [X, [X], [X[:10], X[10:]], [(X[:10], labels[:10]), [X[10:], labels]], (x for x in X.split(7)), loader]
    weights = [applied(net, form, 2)[0][0].weight for form in forms]
    assert all(torch.equal(weights[0], weight) for weight in weights)
    words, texts = Words(), X.view(4, 6, 6)
    named = [{"x": part, "labels": torch.zeros(2)} for part in texts.split(2)]
    assert torch.equal(applied(words, named, 2)[0].one.weight, applied(words, texts, 2)[0].one.weight)


def test_batches_that_cannot_be_joined_go_in_step():
    """Sequences of other lengths: the same moments, within rounding, as of one batch."""
    torch.manual_seed(0)
    words, texts = Words(), correlated(72, 0, 6).view(12, 6, 6)
    ragged = [texts[:4], texts[4:8, :3], texts[4:8, 3:], texts[8:]]
    model, report = applied(words, ragged, 2, topology="interleaved")
    whole, _ = applied(words, texts, 2, topology="interleaved")
    assert torch.allclose(model.one.weight, whole.one.weight, atol=1e-5)
    assert all(r.fidelity.error is not None for r in report.pruned)


def test_examples_beyond_those_asked_for_are_not_read():
    def endless():
        while True:
            yield torch.randn(4, 6)

    assert applied(mlp(6, 8), endless(), 2, samples=10)[1].pruned[0].fidelity.rows == 10


class Brittle(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.passes = nn.Linear(6, 8), nn.Linear(8, 4), 0

    def forward(self, x):
        self.passes += 1
        if len(x) not in (2, 24):
            raise RuntimeError("not with these")
        return self.two(self.one(x) / (0 if self.passes > 1 else 1))


def infinite():
    net = mlp(6, 8, 4)
    net[2].weight.data[0, 0] = float("inf")
    return net


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (mlp(6, 8, 4), None, ValueError, r"needs calibration data: method=sao_prune.Project\(inputs=loader\)"),
        (mlp(6, 8, 4), [], ValueError, "gave no batch"),
        (mlp(6, 8, 4), torch.zeros(0, 6), ValueError, "holds no examples"),
        (mlp(6, 8, 4), torch.full((4, 6), float("nan")), ValueError, "batch 0 holds NaN"),
        (mlp(6, 8, 4), 7, TypeError, "an iterable of batches, got int"),
        (mlp(6, 8, 4), ["words"], TypeError, "batch 0 is a str"),
        (mlp(6, 8, 4), torch.zeros(4, 5), ValueError, "does not run on the calibration data"),
        (mlp(6, 8, 4), [torch.zeros(4, 6), torch.zeros(4).long()], ValueError, "give the inputs alone"),
        (mlp(6, 8, 4), (torch.zeros(4, 6), torch.zeros(4)), ValueError, r"batch 1 is float32 \(4,\), batch 0"),
        (mlp(6, 8, 4), [X, torch.zeros(4, 5)], ValueError, "inputs of 0.weight have 5 and 6 features in different"),
        (
            mlp(6, 8, 4),
            {"pixels": X},
            ValueError,
            "holds pixels, of which Sequential.forward takes nothing",
        ),
        (mlp(6, 8, 4), X.to_sparse(), TypeError, "batch 0 holds a tensor of layout sparse_coo"),
        (mlp(6, 8, 4), X * 1e19, ValueError, "inputs of 0.weight are not finite"),
        (infinite(), X, ValueError, "energy of 2.weight is not finite: the weight holds NaN or infinite"),
        (Brittle(), X, ValueError, "inputs of two.weight are not finite"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(model, inputs, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sao_prune.apply(model, groups=2, method=Project(inputs=inputs), seed=0, **ALL)
    assert same(before, snapshot(model))


def test_an_error_in_one_of_several_passes_ends_them_all():
    class Picky(Words):
        def forward(self, x):
            if x.shape[1] == 3:
                raise RuntimeError("not three")
            return super().forward(x)

    model, texts = Picky(), X.view(4, 6, 6)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="not three"):
        sao_prune.apply(model, groups=2, method=Project(inputs=[texts, texts[:, :3]]), **ALL)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "expander"}, "topology must be one of 'clustered'"),
        ({"values": "least-squares"}, "did you mean 'least_squares'"),
        ({"ridge": 0}, "ridge must be a positive finite number, got 0"),
        ({"samples": 0}, "samples must be a positive whole number"),
        ({"rows": 2.5}, "rows must be a positive whole number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Project(**options)


def test_the_seed_decides_and_nothing_else():
    net, (x, _) = mlp(6, 12, 12, 4, act=nn.ReLU), digits(64)
    one, two, other = (applied(net, x, 3, seed, rows=20)[0].state_dict() for seed in (0, 0, 1))
    assert same(dict(one), dict(two))
    assert not same(dict(one), dict(other))


@pytest.mark.parametrize("options", [{"fit": "exact", "sparsity": 0.7}, {"sparsity": 0.7}, {"degree": 4}])
def test_uneven_sets_are_those_of_plan(options):
    torch.manual_seed(0)
    net, x = mlp(13, 17, 11, act=nn.Tanh), correlated(50, 0, 13)
    method = Project(inputs=x)
    planned = sao_prune.plan(net, method=method, **options, **ALL)
    done = sao_prune.apply(net, method=method, **options, **ALL)
    assert [r.nnz for r in planned.layers] == [r.nnz for r in done.layers]
    for record, layer in zip(done.layers, (net[0], net[2])):
        assert BlockTopology.from_mask(layer.weight_mask).groups == record.groups


def test_compact_form_gives_the_same_outputs():
    net, x = ConvNet().eval(), correlated(30, 0, 3, 8, 8)
    method = Project(inputs=x)
    masked, compact = copy.deepcopy(net), copy.deepcopy(net)
    sao_prune.apply(masked, groups=4, method=method, seed=0)
    sao_prune.apply(compact, groups=4, method=method, seed=0, form="compact")
    assert torch.allclose(masked.eval()(x), compact.eval()(x), atol=1e-5)


def test_half_precision_and_weights_read_by_other_modules():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

        def forward(self, x):
            return self.out(F.linear(x, self.inner.weight))

    net = Reads().bfloat16()
    model, report = applied(net, torch.randn(40, 8).bfloat16(), 2)
    assert all(r.fidelity.error is not None for r in report.pruned)
    assert model.inner.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [2.0**58, 2.0**-58])
def test_the_scale_of_the_inputs_decides_nothing(scale):
    net = mlp(6, 8, 4, bias=False)
    plain, scaled = (applied(net, x, 2, correct=False)[0] for x in (X, X * scale))
    assert same(dict(plain.state_dict()), dict(scaled.state_dict()))


def test_one_block_changes_nothing():
    net, x = mlp(6, 8, 4), X
    model, report = applied(net, x, 1)
    assert torch.equal(model(x), net(x))
    assert report.sparsity == 0


def test_a_small_network_keeps_more_than_with_kept_values_on_random_sets():
    """Regression of structured data by a network with batch norm; nothing is trained after the conversion."""
    torch.manual_seed(0)
    net, x = ConvNet(), correlated(256, 0, 3, 8, 8)
    y = (x.flatten(1) @ torch.randn(192, 4) / 10).sin()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    net.eval()
    losses = {}
    for topology, values in (("ramanujan", "keep"), ("ramanujan", "least_squares"), ("clustered", "least_squares")):
        model, _ = applied(net, x, 2, topology=topology, values=values, exclude=["stem", "head"], readout=False)
        losses[topology, values] = float(F.mse_loss(model.eval()(x), net(x)))
    assert losses["ramanujan", "least_squares"] < losses["ramanujan", "keep"]
    assert losses["clustered", "least_squares"] < losses["ramanujan", "keep"]


def test_a_generator_of_batches_lasts_for_a_whole_schedule():
    found, first = [], mlp(6, 8, 8, 4)
    for inputs in (list(X.split(5)), (batch for batch in X.split(5))):
        model = copy.deepcopy(first)
        over = sao_prune.Schedule(start=1, end=2, steps=2)
        pruner = sao_prune.schedule(model, Project(inputs=inputs, samples=24), groups=4, over=over, seed=0)
        assert pruner.step() is not None
        assert pruner.step() is not None
        found.append(model.state_dict())
    assert same(*found)


def test_a_loader_that_shuffles_leaves_the_global_generator_alone():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 5, shuffle=True)
    model, state = mlp(6, 8, 4), torch.get_rng_state()
    sao_prune.apply(model, groups=2, method=Project(inputs=loader), seed=0, **ALL)
    assert torch.equal(torch.get_rng_state(), state)
