"""Dense convolutions that compute the batch norm behind them: the first layer of a network, which has its largest
images and is not pruned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._torch import BatchNorm
from ..absorbed import OWNERS
from ..backends import cpu
from ..batch_norm import batch_norm
from ..epilogue import Epilogue
from ..functional import ACTIVATIONS
from .base import Execution, is_plain, track

#: How plans write it.
NORMED = Execution(dense=True, native=True)
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "relu": torch.relu_, "tanh": torch.tanh_}


class NormedConv2d(nn.Conv2d):
    """A dense convolution that computes its ``epilogue``, a batch norm and perhaps the activation behind that."""

    epilogue: Epilogue | None = None

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether a module can be made one: a convolution of torch's own that nobody has changed."""
        own = "forward" in module.__dict__ or "weight" not in module._parameters
        return type(module) in (nn.Conv2d, NormedConv2d) and not own

    def forward(self, x: Tensor) -> Tensor:
        """As of any convolution."""
        # Without gradients a compiler joins what follows by itself; its code for a norm and its gradients is slower.
        left = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        plain = is_plain(x) or left or not x.is_cpu
        epilogue = self.epilogue
        if epilogue is None or not epilogue.begin(x, plain):
            return super().forward(x)
        norm, activation, _ = epilogue.parts()
        assert norm is not None
        return epilogue.done(self._normed(x, norm, activation))

    def _normed(self, x: Tensor, norm: BatchNorm, activation: str) -> Tensor:
        mean, variance = norm.running_mean, norm.running_var
        if norm.training:
            mean = variance = None
        elif not torch.is_grad_enabled():
            # The norm is one more factor of the weight.
            assert mean is not None
            assert variance is not None
            scale, shift, _ = cpu.affine(norm.weight, norm.bias, mean, variance, norm.eps)
            bias = shift if self.bias is None else torch.addcmul(shift, self.bias, scale)
            return _IN_PLACE[activation](self._conv_forward(x, self.weight * scale.view(-1, 1, 1, 1), bias))
        z = super().forward(x)
        y, mean, variance = batch_norm(z, norm.weight, norm.bias, mean, variance, activation, norm.eps)
        if norm.training:
            track(norm, y, mean, variance)
        return y  # type: ignore[no-any-return]


OWNERS[NormedConv2d] = nn.Conv2d
