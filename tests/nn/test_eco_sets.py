"""An ECO convolution follows its set buffers, whoever puts other ones there, and averaging does them no harm."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sao_prune.nn import ECOConv2d

EVEN, UNEVEN = 4, 5
GROUPS = pytest.mark.parametrize("groups", [EVEN, UNEVEN])


def layer(seed: int, groups: int) -> ECOConv2d:
    return ECOConv2d(8, 16, 3, groups=groups, seed=seed)


def image() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def tensors(module: ECOConv2d) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def dense(module: ECOConv2d) -> ECOConv2d:
    """The same convolution without blocks."""
    twin = ECOConv2d(8, 16, 3, seed=0)
    with torch.no_grad():
        twin.weight.copy_(module.dense_weight())
    return twin


@GROUPS
def test_a_call_with_tensors_of_another_topology(groups):
    one, other, x = layer(0, groups), layer(1, groups), image()
    before, expected = one(x), dense(other)(x)
    assert not torch.allclose(before, expected)
    close(torch.func.functional_call(one, tensors(other), (x,)), expected)
    close(one(x), before)


def test_ensembles_of_several_topologies():
    layers, x = [layer(seed, EVEN) for seed in range(3)], image()
    for base in (layers[0], copy.deepcopy(layers[0]).to("meta")):

        def run(p, b, base=base):
            return torch.func.functional_call(base, (p, b), (x,))

        found = torch.vmap(run)(*torch.func.stack_module_state(layers))
        close(found, torch.stack([each(x) for each in layers]))
    layers = [layer(seed, UNEVEN) for seed in range(2)]
    stacked = torch.func.stack_module_state(layers)
    with pytest.raises(RuntimeError, match="uneven and differ"):
        torch.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(*stacked)


@GROUPS
def test_what_is_written_into_the_buffers_is_followed(groups):
    """As collectives and distributed checkpoints write: into their memory, without a version."""
    one, other, x = layer(0, groups), layer(1, groups), image()
    one(x)
    for mine, theirs in zip(tensors(one).values(), tensors(other).values()):
        mine.data.copy_(theirs)
    close(one(x), other(x))
    close(one.dense_weight(), other.dense_weight())
    assert one.topology == other.topology


@GROUPS
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.992, 0.9999])
def test_averages_with_buffers(groups, decay):
    one, x = layer(0, groups), image()
    averages = [
        AveragedModel(one, avg_fn=get_ema_avg_fn(decay), use_buffers=True),
        AveragedModel(one, use_buffers=True),
    ]
    timm_utils = pytest.importorskip("timm.utils")
    averages += [timm_utils.ModelEmaV2(one, decay=decay), timm_utils.ModelEmaV3(one, decay=decay)]
    for average in averages:
        for _ in range(5):
            average.update_parameters(one) if isinstance(average, AveragedModel) else average.update(one)
        close(average.module(x), one(x))
        fresh = layer(1, groups)
        fresh.load_state_dict(average.module.state_dict())
        close(fresh(x), one(x))
        assert torch.equal(fresh.row_set, one.row_set)


@GROUPS
def test_states_of_other_topologies_and_of_an_earlier_format(groups):
    one, x = layer(0, groups), image()
    state = one.state_dict()
    assert set(state) == {"weight", "bias", "row_set", "col_set"}
    earlier = {**state, "row_set": one.topology.row_set, "col_set": one.topology.col_set}
    assert earlier["row_set"].dtype == torch.int64
    for given in (state, earlier):
        other = layer(1, groups)
        other.load_state_dict(given)
        close(other(x), one(x))
        empty = layer(1, groups).to("meta")
        empty.load_state_dict(given, assign=True)
        close(empty(x), one(x))
        empty = layer(1, groups).to("meta").to_empty(device="cpu")
        empty.load_state_dict(given)
        close(empty(x), one(x))


@GROUPS
def test_modes_and_copies(groups):
    from torch._subclasses.fake_tensor import FakeTensorMode

    one, x = layer(0, groups), image()
    expected = one(x)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        close(other(x), expected)
    fresh = layer(1, groups)
    with torch.inference_mode():
        fresh.load_state_dict(one.state_dict())
        close(fresh(x), expected)
    fresh(x).sum().backward()
    unused = layer(0, groups)
    unused.load_state_dict(fresh.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert unused(mode.from_tensor(x)).shape == expected.shape
    close(unused(x), expected)
    assert fresh.to("meta")(x.to("meta")).shape == expected.shape
    close(torch.compile(one, backend="eager", fullgraph=True)(x), expected)
    close(torch.export.export(one, (x,)).module()(x), expected)
    close(torch.jit.trace(one, x)(x), expected)
