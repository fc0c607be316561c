"""What a training step holds in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Count what autograd saves while the ``with`` lasts.

    Whatever saves it: torch's operators, and custom ones by ``ctx.save_for_backward``.

    Yields:
        A dictionary, empty at first: bytes by the address of the memory that saved tensors lie in, so that tensors that
        share memory count once.

    Example:
        >>> x = torch.ones(8, requires_grad=True)
        >>> with saved_for_backward() as saved:
        ...     y = (2 * x).tanh()
        >>> saved == {y.data_ptr(): 32}
        True
    """
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found.update(_storages([tensor]))
        # Not the tensor itself, which would keep itself alive through its own graph.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def step_memory(
    modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, saved: Mapping[int, int]
) -> dict[str, int]:
    """What a training holds at the end of a step's forward pass, bytes.

    Memory that several tensors share counts once. What operators use while they compute, and what an allocator keeps
    for later, does not count.

    Args:
        modules: that are trained, after a first step of the optimizer; an average of them too.
        optimizer: theirs.
        saved: from `saved_for_backward` around the forward pass.

    Returns:
        ``weights`` (parameters and buffers, masks among them), ``gradients``, ``optimizer`` (its state) and ``saved``
        (what the backward pass needs beside the weights themselves: activations, products of weights and masks).

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
        >>> with saved_for_backward() as saved:
        ...     loss = layer(torch.ones(8, 4)).sum()
        >>> loss.backward(), optimizer.step()
        (None, None)
        >>> step_memory([layer], optimizer, saved)
        {'weights': 40, 'gradients': 40, 'optimizer': 40, 'saved': 128}
    """
    modules = list(modules)
    parameters = [p for module in modules for p in module.parameters()]
    weights = _storages(chain(parameters, *(module.buffers() for module in modules)))
    states = (value for state in optimizer.state.values() for value in state.values())
    parts = {
        "weights": weights,
        "gradients": _storages(p.grad for p in parameters if p.grad is not None),
        "optimizer": _storages(value for value in states if isinstance(value, Tensor)),
        "saved": {address: size for address, size in saved.items() if address not in weights},
    }
    return {name: sum(part.values()) for name, part in parts.items()}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory that tensors lie in, by its address; sparse ones are left out."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided)
    return {storage.data_ptr(): storage.nbytes() for storage in found}
