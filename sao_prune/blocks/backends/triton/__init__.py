"""Block layers on CUDA, and with ``TRITON_INTERPRET=1`` on any CPU: permutations, bias and activation in one kernel.

Plain functions on tensors, without autograd. ``suits_linear`` and ``suits_conv`` say whether the kernels can take
operands; they are False, and nothing is imported, where Triton is not installed.

Tables of channels are looked at once, for which a device waits, and remembered as long as the tensor lives: pass the
same tensor every time, such as a module's buffer, and run a layer once before it is captured in a CUDA graph.
"""

from .conv import conv_backward, conv_forward
from .linear import linear_backward, linear_forward
from .suits import available, suits_conv, suits_linear

__all__ = [
    "available",
    "conv_backward",
    "conv_forward",
    "linear_backward",
    "linear_forward",
    "suits_conv",
    "suits_linear",
]
