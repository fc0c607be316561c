"""Dense convolutions that compute the batch norm behind them: the first layer of a network, which has its largest
images and is not pruned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._torch import BatchNorm
from ...topology import encode_sets
from ..absorbed import OWNERS
from ..backends import cpu
from ..batch_norm import batch_norm
from ..epilogue import Epilogue
from ..functional import ACTIVATIONS, Geometry, each
from .base import Execution, is_plain, normed, track

#: How plans write it.
NORMED = Execution(dense=True, native=True)
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "relu": torch.relu_, "tanh": torch.tanh_}
_FEW = 4  # channels of an input: those of images
_SMALL = 9  # places of a kernel


class NormedConv2d(nn.Conv2d):
    """A dense convolution that computes its ``epilogue``, a batch norm and perhaps the activation behind that.

    Of images of few channels the kernels compute the convolution too, as that of a single block.
    """

    epilogue: Epilogue | None = None
    # The sets of a single block, of all rows and columns of the weight.
    whole: tuple[Tensor, Tensor]

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether a module can be made one: a convolution of torch's own that nobody has changed."""
        own = "forward" in module.__dict__ or "weight" not in module._parameters
        return type(module) in (nn.Conv2d, NormedConv2d) and not own

    @classmethod
    def become(cls, module: nn.Module) -> None:
        """Make a module that suits one, in place; `detach` undoes it."""
        module.__class__ = cls
        weight = module._parameters["weight"]
        assert weight is not None
        module.__dict__["whole"] = tuple(
            encode_sets(torch.zeros(n, dtype=torch.long, device="cpu")) for n in weight.shape[:2]
        )

    def forward(self, input: Tensor) -> Tensor:
        """As of any convolution."""
        x, plain = input, is_plain(input) or not input.is_cpu
        epilogue = self.epilogue
        if epilogue is None or not epilogue.begin(x, plain):
            return super().forward(x)
        norm, activation, _ = epilogue.parts()
        assert norm is not None
        return epilogue.done(self._normed(x, norm, activation))

    def _normed(self, x: Tensor, norm: BatchNorm, activation: str) -> Tensor:
        # Once: what parametrizes a weight computes it whenever it is asked for.
        weight = self.weight
        geometry = self._geometry()
        if geometry is not None and self._is_one_block(x, weight, geometry):
            options = list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1
            own = x.contiguous(memory_format=torch.channels_last), weight.unsqueeze(0), self.bias
            return normed(norm, own, self.whole, activation, NORMED.backend, options)
        mean, variance = norm.running_mean, norm.running_var
        if norm.training:
            mean = variance = None
        elif not torch.is_grad_enabled():
            # The norm is one more factor of the weight.
            assert mean is not None
            assert variance is not None
            scale, shift, _ = cpu.affine(norm.weight, norm.bias, mean, variance, norm.eps)
            bias = shift if self.bias is None else torch.addcmul(shift, self.bias, scale)
            return _IN_PLACE[activation](self._conv_forward(x, weight * scale.view(-1, 1, 1, 1), bias))
        z = self._conv_forward(x, weight, self.bias)
        y, mean, variance = batch_norm(z, norm.weight, norm.bias, mean, variance, activation, norm.eps)
        if norm.training:
            track(norm, y, mean, variance)
        return y  # type: ignore[no-any-return]

    def _geometry(self) -> Geometry | None:
        """Stride, padding and dilation as they are set now; nothing where the padding is not numbers of zeros."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        return Geometry(each(self.stride, 2), each(self.padding, 2), each(self.dilation, 2))

    def _is_one_block(self, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
        """Whether the kernels know the convolution and take less time for it than torch, as was measured: with stride 1
        a third, with others only for large kernels, and not backwards."""
        if self.in_channels > _FEW or self.groups != 1:
            return False
        if x.dim() != 4 or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
            return False
        # A weight that was replaced may have other channels, an image ones that torch is to refuse.
        if not [len(sets) for sets in self.whole] == list(weight.shape[:2]) == [weight.shape[0], x.shape[1]]:
            return False
        large = self.kernel_size[0] * self.kernel_size[1] > _SMALL and not torch.is_grad_enabled()
        if not large and geometry.stride != (1, 1):
            return False
        last = weight.is_contiguous(memory_format=torch.channels_last)
        return last and cpu.suits(self.kernel_size, geometry, True)


OWNERS[NormedConv2d] = nn.Conv2d
