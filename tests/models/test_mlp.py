"""MLP-N and MLP-7: the shapes of the thesis's tables, and the ways of timm."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import sao_prune.models
from sao_prune.models import SaoMLP, sao_mlp, sao_mlp7


def shapes(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_mlp_n_has_the_layers_of_table_3_4(depth: int) -> None:
    expected = [(1024, 512), (512, 256), *[(256, 256)] * (depth - 1), (256, 10)]
    assert shapes(timm.create_model("sao_mlp", depth=depth)) == expected


def test_mlp_7_has_the_layers_of_table_3_3() -> None:
    assert shapes(timm.create_model("sao_mlp7")) == [(1024, 100), *[(100, 100)] * 5, (100, 10)]


def test_an_activation_follows_every_hidden_layer_and_none_the_last() -> None:
    model = sao_mlp(depth=3, activation="relu")
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda m, _, y: seen.append((type(m), y)))
    model(torch.randn(2, 1, 32, 32))
    leaves = [kind for kind, _ in seen if kind in (nn.Linear, nn.ReLU)]
    assert leaves == [nn.Linear, nn.ReLU] * 4 + [nn.Linear]


def test_skips_add_the_input_to_the_preactivation_of_equally_wide_layers_only() -> None:
    model = SaoMLP(widths=(6, 4, 4), activation="tanh", skips=True, img_size=2)
    x = torch.randn(3, 1, 2, 2)
    a, b, c = (layer.fc for layer in model.layers)
    h = torch.tanh(b(torch.tanh(a(x.flatten(1)))))
    torch.testing.assert_close(model.forward_features(x), torch.tanh(c(h) + h))


def test_a_linear_network_is_linear() -> None:
    model = sao_mlp7(activation="linear").requires_grad_(False)
    x, y = torch.randn(2, 2, 1, 32, 32).unbind()
    zero = model(torch.zeros_like(x))
    torch.testing.assert_close(model(x + y) - zero, model(x) + model(y) - 2 * zero, atol=1e-4, rtol=1e-4)


def test_it_has_what_timm_expects_of_a_model() -> None:
    model = timm.create_model("sao_mlp", depth=2, num_classes=7, in_chans=3, img_size=8)
    x = torch.randn(2, 3, 8, 8)
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.head
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert {"sao_mlp", "sao_mlp7"} <= set(timm.list_models("sao_*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 0}, "positive integer, got 0"),
        ({"depth": 2.5}, "got 2.5"),
        ({"depth": 2, "activation": "tnh"}, "did you mean 'tanh'"),
        ({"depth": 2, "img_size": 0}, "img_size"),
        ({"depth": 2, "pretrained": True}, "no pretrained weights"),
    ],
)
def test_bad_options_are_refused_with_a_reason(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sao_mlp(**options)


def test_the_networks_work_without_timm() -> None:
    code = (
        "import sys; sys.modules['timm'] = None; import torch, sao_prune.models as m; "
        "print(m.sao_mlp(depth=2)(torch.zeros(1, 1, 32, 32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[1, 10]" in done.stdout


def test_public_names() -> None:
    assert {"SaoMLP", "sao_mlp", "sao_mlp7"} <= set(sao_prune.models.__all__)
