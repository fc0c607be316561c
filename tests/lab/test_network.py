"""The networks that every method of a seed starts from, and how isometric they are over depth."""

import pytest
import timm
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.lab.depth import depth_spectrum
from sao_prune.lab.errors import LabError
from sao_prune.lab.network import build_network, initial_network

GREY = {"in_chans": 1, "img_size": 32}
TINY = {"in_chans": 1, "img_size": 4}


def test_initial_weights_are_orthogonal_times_gain_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = (initial_network("sao_mlp", {"depth": 3}, 10, GREY, gain=1.1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters()):
        assert torch.equal(a, b)
        if name.endswith("bias"):
            assert not a.any()
        else:
            assert not torch.equal(a, c)
            assert torch.linalg.svdvals(a.detach()).sub(1.1).abs().max() < 1e-4


def test_networks_that_cannot_be_built_are_one_sentence() -> None:
    with pytest.raises(LabError, match="timm knows no network 'sao_mpl'"):
        build_network("sao_mpl", {}, 10, GREY)
    with pytest.raises(LabError, match=r"sao_mlp: .*colour"):
        build_network("sao_mlp", {"colour": 1}, 10, GREY)


def test_the_jacobian_over_depth_is_the_product_of_the_layers() -> None:
    model = initial_network("sao_mlp7", {"activation": "linear"}, 3, TINY, gain=1.3)
    sao_prune.apply(model, groups=4, method="rg", seed=0, skip_first=True)
    spectrum = depth_spectrum(model, torch.randn(1, 4, 4))
    assert spectrum.depth == (1, 2, 3, 4, 5, 6)
    product = torch.eye(16, dtype=torch.float64)
    for k, layer in enumerate(model.layers):
        product = layer.fc.weight.detach() @ product
        values = torch.linalg.svdvals(product)
        assert spectrum.mean[k] == pytest.approx(float(values.mean()), rel=1e-9)
        assert spectrum.largest[k] == pytest.approx(float(values.max()), rel=1e-9)
        assert spectrum.smallest[k] == pytest.approx(float(values.min()), abs=1e-12)


def test_the_jacobian_of_a_nonlinear_network_is_that_of_automatic_differentiation() -> None:
    model = initial_network("sao_mlp7", {}, 3, TINY, gain=1.1)
    image = torch.randn(1, 4, 4)
    spectrum = depth_spectrum(model, image)
    jacobian = torch.func.jacrev(model.forward_features)(image.double().unsqueeze(0)).reshape(100, 16).detach()
    assert spectrum.mean[-1] == pytest.approx(float(torch.linalg.svdvals(jacobian).mean()), rel=1e-9)


class _Attention(nn.Module):
    """A layer, an encoder of torch's or its attention alone, a layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=kind == "pre-norm")
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True) if kind == "attention" else encoder

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1, 2))
        return self.mix(x, x, x)[0] if isinstance(self.mix, nn.MultiheadAttention) else self.mix(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.forward_features(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["timm", "attention", "pre-norm", "post-norm"])
def test_the_jacobian_of_attention_is_that_of_automatic_differentiation(kind: str) -> None:
    torch.manual_seed(0)
    small = {"img_size": 4, "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="", **small) if kind == "timm" else _Attention(kind)
    image = torch.randn(1, 4, 4)
    spectrum = depth_spectrum(model, image)
    jacobian = torch.autograd.functional.jacobian(model.forward_features, image.double().unsqueeze(0)).reshape(-1, 16)
    assert spectrum.mean[-1] == pytest.approx(float(torch.linalg.svdvals(jacobian).mean()), rel=1e-9)
