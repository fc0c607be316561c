"""The flow of ones through the absolute values of a network, and its gradient, at any depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._torch import ConvNd, NormBase, tree_leaves
from ..discovery import call
from .saliency import floats_as

# Activations that are the identity on positive flow, or would be if they did not saturate or bend.
_PASSED_OVER = {
    torch.tanh,
    torch.tanh_,
    Tensor.tanh,
    Tensor.tanh_,
    F.tanh,
    F.hardtanh,
    F.relu6,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.softsign,
    F.softplus,
    F.elu,
    F.selu,
    F.celu,
}


class _Linearised(TorchFunctionMode):
    """Passes saturating activations over."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PASSED_OVER:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


class _Rescaling:
    """Forward hooks that divide each layer's output by its largest entry.

    Along a chain of layers every gradient is multiplied by the same number then, so their order stays. ``scales``
    collects the factors, for `flow_gradients` to make sure of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.scales: list[Tensor] = []
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | ConvNd)]
        self._handles = [layer.register_forward_hook(self._scale) for layer in layers]

    def __enter__(self) -> _Rescaling:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _scale(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        largest = output.detach().amax()
        if not bool(largest > 0):
            return output
        scale = (1 / largest).requires_grad_(True)
        self.scales.append(scale)
        return output * scale


@torch.no_grad()
def flow_network_(model: nn.Module) -> nn.Module:
    """Make a model's parameters positive and its biases and running means zero, in place, so that only flow is left."""
    for name, parameter in model.named_parameters():
        parameter.zero_() if "bias" in name.rpartition(".")[2] else parameter.abs_()
    for module in model.modules():
        if isinstance(module, NormBase) and module.running_mean is not None:
            module.running_mean.zero_()
    return model.eval()


class Flow:
    """The flow through a model, and how it depends on each of its weights.

    Args:
        model: from `flow_network_`, in double precision; its weights may change between calls.
        ones: the input.
        weights: of the model.
    """

    def __init__(self, model: nn.Module, ones: Any, weights: Sequence[Tensor]) -> None:
        self._model, self._ones, self._weights = model, ones, weights
        self._rescale = False

    def gradients(self) -> list[Tensor]:
        """Gradient of the sum of outputs by each weight, up to a factor that all of them share.

        Raises:
            ValueError: if the model does not run on the input, or the flow leaves the range of double precision and
                the model is no chain of layers, in which it can be rescaled.
        """
        if not self._rescale:
            total, found = _differentiate(self._model, self._ones, self._weights)
            if bool(total != 0) and _finite(total, *found):
                return found
        with _Rescaling(self._model) as rescaling:
            total, found = _differentiate(self._model, self._ones, self._weights, rescaling.scales)
        if bool(total == 0):
            return [torch.zeros_like(w) for w in self._weights]
        self._rescale = True
        count = len(self._weights)
        shares = [scale.detach() * by / total for scale, by in zip(rescaling.scales, found[count:])]
        if not _finite(total, *found) or any(abs(float(share) - 1) > 1e-6 for share in shares):
            raise ValueError(
                f"the flow through {type(self._model).__name__} leaves the range of double precision, and with its "
                "skips or norms it cannot be rescaled layer by layer: take a shallower model or another method"
            )
        return found[:count]


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _differentiate(
    model: nn.Module, ones: Any, weights: Sequence[Tensor], scales: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """The sum of outputs and its gradients; ``scales`` may be filled by the pass itself."""
    try:
        with _Linearised():
            outputs = call(model, floats_as(ones, torch.float64))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(ones))
        raise ValueError(
            f"{type(model).__name__} does not run on an input of shape {shapes}: {error}; give "
            "method=sao_prune.SynFlow(inputs=x), of which only the shape is used"
        ) from error
    flows = [t.sum() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    total = torch.stack(flows).sum()
    by = [*weights, *scales]
    found = torch.autograd.grad(total, by, allow_unused=True) if total.requires_grad else [None] * len(by)
    return total.detach(), [torch.zeros_like(w) if g is None else g for g, w in zip(found, by)]
