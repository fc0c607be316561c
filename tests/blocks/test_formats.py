"""The memory format of a model's dense convolutions is tried too, and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import autotune, tuning
from sao_prune.blocks.plan import Choice


class _Mixed(nn.Module):
    """A dense convolution, something that depends on memory formats, and linear layers."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.fc = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.between(self.conv(x)).flatten(1))
        return result


class _Scale(torch.autograd.Function):
    """Its gradient is a view that channels last does not allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad.view(-1) * 0.5).view_as(grad)


def _made(between: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = _Mixed(between)
    sao_prune.apply(model, sparsity=0.875, seed=0, include=["fc.*"], skip_first=False, skip_last=False)
    return model, torch.randn(4, 3, 8, 4)


@pytest.fixture
def eager_for_channels_last(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whole models that run channels last count as faster, and layers are always worth making compact."""
    seen: list[bool] = []

    def time_model(model: nn.Module, *args: Any) -> float:
        seconds = autotune.time_model(model, *args)
        last = model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        seen.append(last)
        return seconds / 1e6 if last else seconds

    choose = autotune.Timings.choice

    def choice(timings: autotune.Timings, channels_last: bool) -> Choice:
        return choose(replace(timings, current=float("inf")), channels_last)

    monkeypatch.setattr(tuning, "time_model", time_model)
    monkeypatch.setattr(autotune.Timings, "choice", choice)
    return seen


def _is_last(model: nn.Module) -> bool:
    return bool(model.conv.weight.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_the_faster_format_is_taken_and_given_back(mode, eager_for_channels_last):
    model, x = _made(nn.Identity())
    expected = model(x)
    sao_prune.compact(model, example_input=x, tune=mode)
    assert set(eager_for_channels_last) == {True, False}
    assert _is_last(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    sao_prune.expand(model)
    assert not _is_last(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_was_channels_last_stays_so(eager_for_channels_last):
    model, x = _made(nn.Identity())
    model.conv.to(memory_format=torch.channels_last)
    sao_prune.compact(model, example_input=x, tune="infer")
    sao_prune.expand(model)
    assert _is_last(model)


def test_views_that_a_format_does_not_allow(eager_for_channels_last):
    model, x = _made(lambda t: t.view(len(t), -1))
    sao_prune.compact(model, example_input=x, tune="train")
    assert not _is_last(model)
    model(x).sum().backward()


def test_gradients_that_a_format_does_not_allow(eager_for_channels_last):
    second = nn.Conv2d(8, 8, 1)  # its gradients lie as its weight does
    model, x = _made(lambda t: second(_Scale.apply(t)))
    model.second = second
    sao_prune.compact(model, example_input=x, tune="train")
    assert not _is_last(model)
    model(x).sum().backward()


def test_shared_weights_stay_shared(eager_for_channels_last):
    model, x = _made(nn.Identity())
    model.share_memory()
    sao_prune.compact(model, example_input=x, tune="infer")
    assert model.conv.weight.is_shared()


def test_a_model_in_which_nothing_gains_stays_as_it_is(eager_for_channels_last, monkeypatch):
    monkeypatch.setattr(autotune.Timings, "choice", lambda *_: Choice(None, 1.0, "faster as it is"))
    model, x = _made(nn.Identity())
    report = sao_prune.compact(model, example_input=x, tune="infer")
    assert report.compact == ()
    assert not _is_last(model)
