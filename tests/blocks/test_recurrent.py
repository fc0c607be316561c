"""Recurrent layers and cells in their block form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import sao_prune
from sao_prune.blocks import BlockLinear, BlockLSTM
from sao_prune.blocks.modules import recurrent as steps

from .composites import check_law, check_states, pruned

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


@st.composite
def layers(draw):
    name = draw(st.sampled_from(sorted(KINDS)))
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if name == "LSTM" and draw(st.booleans()):
        options["proj_size"] = 4
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    inputs, hidden = draw(st.sampled_from([(8, 8), (12, 8), (8, 5)]))
    topology = draw(st.sampled_from(["interleaved", "apart"]))
    return pruned(KINDS[name](inputs, hidden, **options), draw(st.integers(0, 99)), topology, groups=2)


@given(
    model=layers(),
    shape=st.sampled_from(["batch", "single", "packed"]),
    started=st.booleans(),
    small=st.sampled_from([0, 1 << 18]),
)
@settings(max_examples=14, deadline=None)
def test_results_states_and_gradients_are_those_of_the_masked_layer(model, shape, started, small):
    layer = model.layer
    lengths = [4, 2, 5] if shape == "packed" else [3, 3]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, layer.input_size, generator=generator, dtype=torch.float64) for n in lengths]
    inputs = inputs[:1] if shape == "single" else inputs
    rows = layer.num_layers * (1 + layer.bidirectional)
    batch = () if shape == "single" else (len(inputs),)
    sizes = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * (layer.mode == "LSTM")
    states = [torch.randn(rows, *batch, size, generator=generator, dtype=torch.float64) for size in sizes]

    def run(model, *given):
        sequences, hx = given[: len(inputs)], given[len(inputs) :]
        if shape == "packed":
            x = pack_sequence(list(sequences), enforce_sorted=False)
        else:
            x = sequences[0] if shape == "single" else torch.stack(sequences, 0 if layer.batch_first else 1)
        return model(x, (hx if layer.mode == "LSTM" else hx[0]) if started else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_SMALL_STEP", small)
        compact = check_law(model, run, [*inputs, *(states if started else [])])
    assert {m.layer.execution.dense for m in compact.layer.matrices()} == {small > 0}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("topology", ["interleaved", "apart"])
@pytest.mark.parametrize("batched", [True, False])
def test_cells(kind, topology, batched):
    model = pruned(kind(12, 8), 3, topology, groups=2)
    x, h, c = torch.randn(3, *((4,) if batched else ()), 12, dtype=torch.float64)
    states = (h, c) if kind is nn.LSTMCell else (h,)

    def run(model, x, *states):
        states = tuple(s[..., :8] for s in states)
        return [model(x), model(x, states if kind is nn.LSTMCell else states[0])]

    check_law(model, run, [x, *states])


def test_one_block_product_serves_all_gates():
    for topology, copies in (("interleaved", 1), ("apart", 4)):
        model = pruned(nn.LSTM(16, 8), 0, topology, groups=2)
        sao_prune.compact(model)
        inputs, states = (matrix.layer for matrix in model.layer.matrices())
        assert isinstance(inputs, BlockLinear)
        assert (inputs.copies, states.copies) == (copies, copies)
        assert inputs.blocks.numel() == 4 * 8 * 16 // 2
        assert states.blocks.numel() == 4 * 8 * 8 // 2


def test_dropout_between_layers_falls_in_training_only():
    model = pruned(nn.GRU(8, 8, num_layers=2, dropout=0.5), groups=2)
    sao_prune.compact(model)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("topology", ["interleaved", "apart"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell])
def test_states(kind, topology, tmp_path):
    model = pruned(kind(8, 6), 1, topology, groups=2)
    sao_prune.compact(model)
    check_states(model, lambda: type(model)(kind(8, 6)).double(), tmp_path)


def test_a_weight_without_blocks_stays_masked():
    model = pruned(nn.LSTM(8, 8), groups=2, include=["*weight_ih*"])
    ends = {"skip_first": False, "skip_last": False}
    sao_prune.apply(model, 0.3, method="lrp", seed=0, include=["*weight_hh*"], **ends)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    before = copy.deepcopy(model)
    report = sao_prune.compact(model)
    assert isinstance(model.layer, BlockLSTM)
    reasons = {record.name: record.reason for record in report.layers}
    assert reasons["layer.weight_ih_l0"] is None
    assert "complete blocks" in reasons["layer.weight_hh_l0"]
    torch.testing.assert_close(model(x), before(x))
    model(x)[0].sum().backward()
    assert model.layer.weight_hh_l0_orig.grad is not None
    sao_prune.expand(model)
    assert set(model.state_dict()) == set(before.state_dict())
    torch.testing.assert_close(model(x), before(x))


@pytest.mark.parametrize("form", ["compact", "masked"])
def test_applied_and_baked_layers(form):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    model = copy.deepcopy(dense)
    sao_prune.apply(model, groups=2, seed=5, form=form, skip_first=False, skip_last=False)
    other = copy.deepcopy(dense)
    sao_prune.apply(other, groups=2, seed=5, skip_first=False, skip_last=False)
    if form == "masked":
        sao_prune.remove(model)
        sao_prune.compact(model)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(model(x), other(x))
    assert sao_prune.report(model).sparsity == 0.5
    sao_prune.expand(model)
    assert ("1.weight_ih_l0_mask" in model.state_dict()) == (form == "compact")


def test_meta_models_are_made_compact():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8, num_layers=2), nn.MultiheadAttention(8, 2))
    sao_prune.apply(model, groups=2, seed=0, form="compact", skip_first=False, skip_last=False)
    assert not any(p.is_meta for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("small", [0, 1 << 18])
def test_shapes_that_do_not_fit_are_refused(small, monkeypatch):
    monkeypatch.setattr(steps, "_SMALL_STEP", small)
    model = pruned(nn.LSTM(8, 8), groups=2)
    sao_prune.compact(model)
    with pytest.raises(RuntimeError, match=r"(?i)expected 8.* got 7"):
        model(torch.randn(3, 2, 7, dtype=torch.float64))
    state = torch.zeros(1, 3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"(?i)expected (states|hidden)"):
        model(torch.randn(3, 2, 8, dtype=torch.float64), (state, state))


def test_layers_with_small_steps_run_by_torchs_kernel_unless_somebody_watches_inside():
    model = nn.Sequential(nn.LSTM(256, 256), nn.LSTM(512, 512))
    sao_prune.apply(model[0], 0.9, seed=0, skip_first=False, skip_last=False)
    sao_prune.apply(model[1], 0.9, seed=0, skip_first=False, skip_last=False)
    for lstm, dense in ((model[0], True), (model[1], False)):
        x = torch.randn(3, 2, lstm.input_size)
        expected = lstm(x)[0]
        report = sao_prune.compact(lstm)
        assert [r.execution.startswith("dense: ") for r in report.compact] == [dense, dense]
        calls = []
        torch.testing.assert_close(lstm(x)[0], expected)
        hook = lstm.weight_hh_l0.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.testing.assert_close(lstm(x)[0], expected)
        assert len(calls) == 3
        hook.remove()
        lstm(x)
        assert len(calls) == 3


def test_one_optimizer_step_is_that_of_the_masked_layer():
    masked = pruned(nn.GRU(8, 8), groups=2)
    compact = copy.deepcopy(masked)
    sao_prune.compact(compact)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    for model in (masked, compact):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(x)[0].square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(compact(x), masked(x))


@pytest.mark.parametrize("kinds", [("interleaved", "apart"), ("apart", "interleaved")])
def test_states_of_another_topology(kinds, tmp_path):
    models = [pruned(nn.LSTM(8, 8), seed, kind, groups=2) for seed, kind in enumerate(kinds)]
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    y = models[1](x)
    for model in models:
        sao_prune.compact(model)
    sao_prune.load(models[0], sao_prune.save(models[1], tmp_path / "state.safetensors"))
    torch.testing.assert_close(models[0](x), y)
    sao_prune.expand(models[0])
    torch.testing.assert_close(models[0](x), y)


def test_gates_that_share_blocks_are_not_held_as_one_matrix():
    model = pruned(nn.LSTM(8, 8), 0, "interleaved", groups=2)
    sao_prune.compact(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="several gates"):
        sao_prune.hold(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_what_models_ask_of_torchs_layers(kind):
    model = pruned(kind(8, 8, bidirectional=True, batch_first=True), groups=2).eval()
    sao_prune.compact(model)
    model.layer.flatten_parameters()
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model.layer, (x,), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("small", [0, 1 << 18])
def test_sequences_without_a_step_are_refused(small, monkeypatch):
    monkeypatch.setattr(steps, "_SMALL_STEP", small)
    model = pruned(nn.LSTM(8, 8), groups=2)
    sao_prune.compact(model)
    with pytest.raises(RuntimeError, match=r"at least one step|larger than 0"):
        model(torch.randn(0, 2, 8, dtype=torch.float64))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_autocast_gives_the_type_that_torchs_layers_give(kind, monkeypatch):
    monkeypatch.setattr(steps, "_SMALL_STEP", 0)
    model = pruned(kind(8, 8), groups=2).float()
    masked, x = copy.deepcopy(model), torch.randn(3, 2, 8)
    sao_prune.compact(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x)[0], masked(x)[0], rtol=0.1, atol=0.1)
