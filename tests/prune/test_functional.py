"""The conventions of torch.nn.utils.prune hold on one module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sao_prune
from sao_prune import prune


def test_functional_sao_follows_torchs_conventions():
    layer = nn.Linear(32, 16)
    original = layer.weight
    assert prune.sao(layer, "weight", sparsity=0.75, seed=0) is layer
    assert torch_prune.is_pruned(layer)
    assert layer.weight_orig is original
    assert set(dict(layer.named_buffers())) == {"weight_mask"}
    assert layer.weight_mask.dtype == layer.weight_orig.dtype
    assert isinstance(next(iter(layer._forward_pre_hooks.values())), prune.SAOPruning)
    assert (torch.linalg.svdvals(layer.weight) - 1).abs().max() < 1e-5
    baked = layer.weight.detach().clone()
    torch_prune.remove(layer, "weight")
    assert torch.equal(layer.weight, baked)
    assert layer.weight is original
    assert not torch_prune.is_pruned(layer)


@pytest.mark.parametrize("options", [{"sparsity": 0.75}, {"groups": 4}, {"degree": 8}])
def test_the_three_amounts_agree(options):
    layer = prune.sao(nn.Linear(32, 32), **options, seed=1)
    assert layer.weight_mask.mean().item() == 0.25


def test_class_form():
    layer = nn.Conv2d(8, 8, 3)
    prune.SAOPruning.apply(layer, "weight", 0.5, seed=0)
    assert layer.weight_mask.mean().item() == 0.5
    assert int((layer.weight != 0).sum()) == 32
    prune.KernelL1Pruning.apply(conv := nn.Conv2d(4, 4, 3), "weight", amount=0.25)
    assert conv.weight_mask.mean().item() == 0.75


def test_stacking_over_torchs_pruning_joins_the_masks():
    layer = nn.Linear(32, 32)
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    before = layer.weight_mask.clone()
    prune.ramanujan(layer, sparsity=0.5, seed=0)
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, torch_prune.PruningContainer)
    topology = sao_prune.topology.ramanujan(32, 32, 2)
    assert bool((layer.weight_mask <= before).all())
    assert layer.weight_mask.sum() < before.sum()
    assert topology.groups == 2
    torch_prune.random_unstructured(layer, "weight", amount=0.5)
    layer(torch.randn(2, 32)).sum().backward()
    torch_prune.remove(layer, "weight")
    assert not torch_prune.is_pruned(layer)


def test_torchs_pruning_stacks_over_ours():
    layer = prune.sao(nn.Linear(32, 32), sparsity=0.5, seed=0)
    inside = layer.weight_mask.bool()
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    assert layer.weight_mask.mean().item() == 0.25
    assert not bool(layer.weight_mask[~inside].any())


def test_kernel_l1_exact_small_case():
    conv = nn.Conv2d(2, 2, (1, 2), bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[3.0, -3.0]], [[1.0, 0.0]]], [[[-2.0, 2.0]], [[0.0, 1.0]]]]))
    prune.kernel_l1(conv, "weight", amount=0.25)
    # Kernels (0, 1) and (1, 1) tie with norm 1; one of the four goes: the later one.
    assert conv.weight_mask[:, :, 0, 0].tolist() == [[1, 1], [1, 0]]


def test_global_kernel_l1_takes_one_ranking():
    small, large = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        small.weight.mul_(0.01)
    prune.global_kernel_l1([(small, "weight"), (large, "weight")], amount=0.5)
    assert not bool(small.weight_mask.any())
    assert bool(large.weight_mask.all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_drawn_in_float32_and_cast(dtype):
    low = prune.sao(nn.Linear(64, 64).to(dtype), sparsity=0.75, seed=3)
    high = prune.sao(nn.Linear(64, 64), sparsity=0.75, seed=3)
    assert low.weight.dtype == low.weight_mask.dtype == dtype
    assert torch.equal(low.weight.float(), high.weight.to(dtype).float())


def test_masked_weight_copies_and_pickles_while_in_a_graph():
    layer = prune.sao(nn.Linear(8, 8), sparsity=0.5, seed=0)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad_fn is not None
    assert type(layer.weight * 2) is torch.Tensor
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(2, 8)
        assert torch.equal(twin(x), layer(x))
        twin(x).sum().backward()
        assert twin.weight_orig is not layer.weight_orig


def test_memo_keeps_one_copy_of_a_shared_weight():
    layer = prune.sao(nn.Linear(8, 8), sparsity=0.5, seed=0)
    first, second = copy.deepcopy([layer.weight, layer.weight])
    assert first is second


def test_gradient_of_the_masked_weight_reaches_the_parameter():
    layer = prune.sao(nn.Linear(8, 8), sparsity=0.5, seed=0)
    layer(torch.randn(2, 8))
    layer.weight.square().sum().backward()
    assert layer.weight_orig.grad is not None
    assert not bool(layer.weight_orig.grad[layer.weight_mask == 0].any())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.sao(nn.ReLU(), sparsity=0.5), "no prunable weight 'weight'"),
        (lambda: prune.sao(nn.Linear(4, 4), "bias", sparsity=0.5), "cannot be pruned|no prunable weight"),
        (lambda: prune.sao(nn.Linear(4, 4)), "say how sparse"),
        (lambda: prune.sao(nn.Conv2d(4, 4, 3, groups=4), sparsity=0.5), "depthwise"),
        *((lambda a=a: prune.kernel_l1(nn.Linear(4, 4), amount=a), "amount is a share") for a in (2.0, "x")),
        (lambda: prune.kernel_l1(nn.Linear(4, 4), amount=float("nan")), "amount is a share .* got nan"),
        (lambda: prune.global_kernel_l1([], amount=0.5), "at least one"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nan_weights_cannot_be_ranked():
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: the weight holds NaN"):
        prune.kernel_l1(layer, amount=0.5)
    assert not torch_prune.is_pruned(layer)


def test_stacked_kernel_pruning_takes_a_share_of_what_is_left():
    layer = nn.Linear(16, 16)
    for _ in range(2):
        prune.kernel_l1(layer, amount=0.5)
    assert layer.weight_mask.mean().item() == 0.25
    prune.kernel_random(layer, amount=0.5, seed=0)
    assert layer.weight_mask.mean().item() == 0.125
    prune.global_kernel_l1([(layer, "weight")], amount=0.5)
    assert layer.weight_mask.mean().item() == 0.0625


def test_groups_that_a_layer_cannot_have():
    with pytest.raises(ValueError, match="takes from 1 to 8 groups, got 100"):
        prune.sao(nn.Linear(8, 8), groups=100)


def test_the_weight_shown_right_after_pruning_follows_no_later_change():
    layer = prune.sao(nn.Linear(8, 8), groups=4, seed=0)
    with torch.no_grad():
        layer.weight_orig.add_(1)
    assert not bool((layer.weight[layer.weight_mask == 0] != 0).any())


def test_integer_amounts_are_numbers_of_units():
    layer, conv = nn.Linear(4, 4), nn.Conv2d(4, 4, 3)
    assert int((prune.kernel_l1(layer, amount=3).weight_mask == 0).sum()) == 3
    assert int((prune.kernel_l1(layer, amount=3).weight_mask == 0).sum()) == 6
    assert int((prune.kernel_random(conv, amount=1, seed=0).weight_mask == 0).sum()) == 9
    assert int((prune.kernel_random(conv, amount=15, seed=0).weight_mask != 0).sum()) == 0
    pair = [(nn.Linear(4, 4), "weight"), (nn.Linear(4, 8), "weight")]
    prune.global_kernel_l1(pair, amount=7)
    prune.global_kernel_l1(pair, amount=5)
    assert sum(int((m.weight_mask == 0).sum()) for m, _ in pair) == 12
    for wrong in (-1, 17):
        with pytest.raises(ValueError, match="from 0 to the 16 that are left"):
            prune.kernel_l1(nn.Linear(4, 4), amount=wrong)
    with pytest.raises(ValueError, match=r"amount is a share .* got True"):
        prune.kernel_l1(nn.Linear(4, 4), amount=True)


def test_custom_masks_are_torchs_with_what_torchs_lack(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    twin = copy.deepcopy(model)
    mask = torch.block_diag(*[torch.ones(4, 4)] * 2)
    assert prune.custom_from_mask(model[1], "weight", mask) is model[1]
    prune.custom_from_mask(model[1], "bias", torch.tensor([1, 0] * 4))
    torch_prune.custom_from_mask(twin[1], "weight", mask)
    torch_prune.custom_from_mask(twin[1], "bias", torch.tensor([1, 0] * 4))
    assert model.state_dict().keys() == twin.state_dict().keys()
    x = torch.randn(2, 8)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(copy.deepcopy(model)(x), twin(x))
    assert [layer.groups for layer in sao_prune.report(model).pruned] == [2]
    prune.custom_from_mask(model[1], "weight", torch.ones(8, 8).tril())
    assert torch.equal(model[1].weight_mask, mask.tril())


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        (torch.ones(4, 3), ValueError, "must have the shape"),
        (torch.full((4, 4), 0.5), ValueError, "only zeros and ones"),
        (torch.full((4, 4), torch.nan), ValueError, "only zeros and ones"),
        ([[1]], TypeError, "tensor of zeros and ones"),
    ],
)
def test_custom_masks_are_checked(mask, error, said):
    layer = nn.Linear(4, 4)
    with pytest.raises(error, match=said):
        prune.custom_from_mask(layer, "weight", mask)
    with pytest.raises(ValueError, match=r"no parameter 'kernel'; it has: weight, bias"):
        prune.custom_from_mask(layer, "kernel", torch.ones(4, 4))
    assert sorted(layer.state_dict()) == ["bias", "weight"]
