"""The names of torch that it does not promise to keep, all in one place.

Each falls back on something slower that is as right, where there is such a thing; else whoever calls it is told what
this version of torch lacks. Written against torch 2.8 to 2.14.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

_NONE = object()


def private(path: str, what_for: str, fallback: Any = _NONE) -> Any:
    """A name within torch, the fallback where it is missing, or something that says so when it is called.

    Args:
        path: dotted, below ``torch``.
        what_for: who needs it, for the message.
        fallback: what does the same.

    Returns:
        What the name stands for.

    Example:
        >>> private("nn.Linear", "layers").__name__
        'Linear'
        >>> private("_C._no_such_thing", "this example")()
        Traceback (most recent call last):
        RuntimeError: torch ... has no torch._C._no_such_thing, which this example needs: install another version
    """
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, _NONE)
        if found is _NONE:
            return _missing(path, what_for) if fallback is _NONE else fallback
    return found


def _missing(path: str, what_for: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.{path}, which {what_for} needs: install another version"
        )

    return call


# ---- Function transforms: vmap, grad, jvp --------------------------------------------------------------------------


def _by_stack() -> bool:
    stack = private("_C._functorch.peek_interpreter_stack", "block layers")
    return stack() is not None


#: Whether a function transform is running.
transforms_active: Callable[[], bool] = private("_C._are_functorch_transforms_active", "block layers", _by_stack)


def under_transforms() -> bool:
    """Whether a function transform is running, those that `transforms_active` leaves out included."""
    stack = private("_C._functorch.peek_interpreter_stack", "masked weights", None)
    return transforms_active() if stack is None else stack() is not None


#: Whether a tensor is one that a function transform has made around another.
is_wrapped: Callable[[Tensor], bool] = private("_C._functorch.is_functorch_wrapped_tensor", "torch.func")
#: The tensor within.
unwrapped: Callable[[Tensor], Tensor] = private("_C._functorch.get_unwrapped", "torch.func")
#: Whether it stands for several tensors, of which a function sees one.
is_batched: Callable[[Tensor], bool] = private("_C._functorch.is_batchedtensor", "torch.vmap")
#: The dimension of the tensor within by which they are counted.
batch_dim: Callable[[Tensor], int] = private("_C._functorch.maybe_get_bdim", "torch.vmap")
#: Context in which no function transform sees what is computed.
without_transforms: Callable[[], AbstractContextManager[Any]] = private("_C._DisableFuncTorch", "torch.func")


def forward_level() -> int:
    """The level of forward-mode differentiation, negative outside of it; 0 where torch does not tell."""
    level: int = getattr(torch.autograd.forward_ad, "_current_level", 0)
    return level


# ---- Dispatch ------------------------------------------------------------------------------------------------------


def _always() -> int:
    return 1


#: How many dispatch modes are on; where torch does not tell, the dispatcher has to be asked in any case.
dispatch_modes: Callable[[], int] = private("_C._len_torch_dispatch_stack", "block operators", _always)
#: How many function modes are on; likewise.
function_modes: Callable[[], int] = private("_C._len_torch_function_stack", "block operators", _always)
#: The dispatch keys that come after autograd.
after_autograd: Any = private("_C._after_autograd_keyset", "block operators")
#: Context in which subclasses of tensors count as tensors.
without_subclasses: Callable[[], AbstractContextManager[Any]] = private(
    "_C.DisableTorchFunctionSubclass", "compact attention"
)


#: Context in which no function mode sees what is computed, and subclasses of tensors count as tensors.
without_functions: Callable[[], AbstractContextManager[Any]] = private("_C.DisableTorchFunction", "compact")


@contextmanager
def without_modes() -> Iterator[None]:
    """Context in which no dispatch mode sees what is computed; it says so where this torch cannot do that."""
    # Not among what `import torch` brings.
    import_module("torch.utils._python_dispatch")
    with private("utils._python_dispatch._disable_current_modes", "ECO convolutions")():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context in which numbers are computed in the types that they have."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def as_numbers() -> Iterator[None]:
    """Context in which tensors are numbers in the types that they have: `without_modes` and `without_autocast`."""
    with without_modes(), without_autocast():
        yield


def _plain_function(func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    with without_subclasses():
        return func(*args, **(kwargs or {}))


#: ``__torch_function__`` of a subclass whose results are plain tensors.
disabled_torch_function: Any = private(
    "_C._disabled_torch_function_impl", "masked weights", staticmethod(_plain_function)
)
#: Switch gradients on or off for this thread.
set_grad_enabled: Callable[[bool], Any] = private("_C._set_grad_enabled", "masked weights", torch.set_grad_enabled)
#: Whether `torch.jit.trace` is running: its state, else ``None``.
tracing_state: Callable[[], Any] = private(
    "_C._get_tracing_state", "block layers", lambda: private("jit.is_tracing", "block layers")() or None
)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no values, as compilers use them."""
    kind = _fake_class()
    return isinstance(tensor, kind) if kind is not None else type(tensor).__name__ == "FakeTensor"


@cache
def _fake_class() -> type[Tensor] | None:
    try:
        from torch._subclasses.fake_tensor import FakeTensor
    except ImportError:
        return None
    return FakeTensor


# ---- Tensors -------------------------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; ``None`` where torch does not count."""
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def identity(tensor: Tensor) -> int:
    """A number that tells a tensor from others while it lives, also when another took its place by a swap."""
    own: int = getattr(tensor, "_cdata", id(tensor))
    return own


def replicated(tensor: Tensor, mesh: Any) -> Tensor:
    """A tensor that is the same on all ranks as a distributed one.

    Args:
        tensor: this rank's.
        mesh: the ranks.

    Returns:
        A distributed tensor.
    """
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


#: Whether two tensors share memory.
is_alias: Callable[[Tensor, Tensor], bool] = private("_C._is_alias_of", "masked weights", _shares_storage)


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules and functions run as they are written, so that what they do is seen, and nothing is compiled."""
    # Where it was not imported nothing is compiled, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# ---- Export -------------------------------------------------------------------------------------------------------


def _unchecked(condition: Tensor, message: str) -> None:
    """Older versions of torch capture no checks."""


_check_of_programs: Callable[[Tensor, str], None] = private("_assert_async", "captured programs", _unchecked)


def _raise_unless(condition: Tensor, message: str) -> Tensor:
    if not bool(condition):
        raise RuntimeError(message)
    return condition


@cache
def _check_of_traces() -> Callable[[Tensor, str], Any]:
    """Scripted: of operators without a result, `torch.jit` keeps none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checking: Callable[[Tensor, str], Any] = torch.jit.script(_raise_unless)
    return checking


def check_later(condition: Tensor, message: str) -> None:
    """Make a check part of the program that is being captured, by `torch.export` or `torch.jit.trace`.

    Args:
        condition: one truth value.
        message: of the error where it is none.
    """
    (_check_of_programs if tracing_state() is None else _check_of_traces())(condition, message)


def decided_once(method: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A method that compilers call while they capture a program, in place of capturing what it does.

    Args:
        method: without arguments.

    Returns:
        The same; as `torch.compiler.assume_constant_result`, which imports the compiler.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


def is_draft(program: Any) -> bool:
    """Whether an ONNX program is of a draft: older versions of torch record one where all else fails.

    A draft takes the way through the model that the example takes, whatever it is given later.
    """
    return "Draft" in (getattr(program, "_capture_strategy", None) or "")


# ---- Modules -------------------------------------------------------------------------------------------------------

_CONV = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_BATCH = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_INSTANCE = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

# The bases of all convolutions, of transposed ones, of batch norms, and of these and instance norms.
if TYPE_CHECKING:
    ConvNd = nn.modules.conv._ConvNd
    ConvTransposeNd = nn.modules.conv._ConvTransposeNd
    BatchNorm = nn.modules.batchnorm._BatchNorm
    NormBase = nn.modules.batchnorm._NormBase
else:
    ConvNd = private("nn.modules.conv._ConvNd", "layers", _CONV | _TRANSPOSED)
    ConvTransposeNd = private("nn.modules.conv._ConvTransposeNd", "layers", _TRANSPOSED)
    BatchNorm = private("nn.modules.batchnorm._BatchNorm", "norms", _BATCH)
    NormBase = private("nn.modules.batchnorm._NormBase", "norms", _BATCH | _INSTANCE)

#: Whether hooks are registered that every module runs; yes where torch does not tell.
has_global_hooks: Callable[[], bool] = private("nn.modules.module._has_any_global_hook", "epilogues", lambda: True)


# ---- Trees of tensors ----------------------------------------------------------------------------------------------


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return type(tree)((key, _map(function, value)) for key, value in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_map(function, value) for value in tree)
    return function(tree)


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(value)
    else:
        yield tree


#: The leaves of nested tuples, lists and mappings.
tree_leaves: Callable[[Any], list[Any]] = private(
    "utils._pytree.tree_leaves", "example inputs", lambda tree: list(_leaves(tree))
)
#: The same nest with a function applied to every leaf.
tree_map: Callable[[Callable[[Any], Any], Any], Any] = private("utils._pytree.tree_map", "example inputs", _map)
