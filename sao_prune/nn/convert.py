"""Put exact ECO convolutions in place of the convolutions of an existing network."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..discovery import Selector, pick
from ..discovery.trace import evaluating, run
from ..prune import current
from ..replaced import warn_replaced
from ..seeds import Seed, base_seed, named_generator
from ..tables import Column, Line, TableReport, plain, shape_text
from ..topology import BlockTopology, NotBlockStructuredError
from ..weights import frequencies_from_kernel
from .eco import ECOConv2d, pack


@dataclass(frozen=True)
class ConvertRecord:
    """One convolution.

    Attributes:
        name: its path.
        input_size: height and width of its input.
        groups: blocks that it has now.
        exact: whether it is orthogonal on inputs of that size.
        reason: why it was skipped; ``None`` if it was replaced.
    """

    name: str
    input_size: tuple[int, int] | None = None
    groups: int | None = None
    exact: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class ConvertReport(TableReport):
    """What `convert_eco` did; prints as a table.

    Attributes:
        layers: the records, in the order of execution.
        title: heading of the table.
    """

    layers: tuple[ConvertRecord, ...]
    title: str = ""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("layer"),
        Column("input", "right"),
        Column("blocks", "right"),
        Column(""),
    )

    @property
    def converted(self) -> tuple[ConvertRecord, ...]:
        """The records of the convolutions that were replaced."""
        return tuple(r for r in self.layers if r.reason is None)

    @property
    def skipped(self) -> tuple[ConvertRecord, ...]:
        """The records of the convolutions that are as they were."""
        return tuple(r for r in self.layers if r.reason is not None)

    def lines(self) -> list[Line]:
        """One line a convolution."""
        return [
            Line(
                (
                    r.name,
                    "-" if r.input_size is None else shape_text(r.input_size),
                    "-" if r.groups is None else str(r.groups),
                    r.reason or ("exact" if r.exact else "NOT orthogonal"),
                ),
                dim=r.reason is not None,
            )
            for r in self.layers
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The fields of each record."""
        return [plain(record) for record in self.layers]

    def summary(self) -> str:
        """One line of totals."""
        exact = sum(r.exact for r in self.converted)
        return f"{len(self.converted)} convolutions replaced, {exact} of them exact; {len(self.skipped)} skipped"


@dataclass(frozen=True)
class _Call:
    """How one convolution was called on the example input: height and width in and out, of every call."""

    name: str
    module: nn.Conv2d
    sizes: list[tuple[tuple[int, int], tuple[int, int]]]

    @property
    def size(self) -> tuple[int, int]:
        """What it was called with first."""
        return self.sizes[0][0]


def convert_eco(
    model: nn.Module,
    example_input: Any,
    last: int | None = None,
    *,
    include: Selector | None = None,
    exclude: Selector = (),
    only_exact: bool = True,
    gain: float = 1.0,
    seed: Seed = None,
) -> ConvertReport:
    """Replace convolutions by `ECOConv2d`, in place: same channels, same output size, exactly orthogonal.

    Dense convolutions become dense, pruned ones keep their block topology (with a stride: the number of blocks) and,
    if they hold an ECO kernel (``SAO(conv="eco")``), its values; otherwise values are fresh. A bias stays. The thesis
    does this to the last block of its ResNets and the last six convolutions of VGG (section 3.5.3). Make the optimizer
    afterwards: the parameters are new ones.

    Args:
        model: a network; its convolutions are found by running it once.
        example_input: a tensor, or a tuple or dict of arguments.
        last: only the last so many of those that can be converted, in the order of execution; ``None`` for all.
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; only these.
        exclude: the same, for convolutions to skip.
        only_exact: skip those whose kernel does not fit their input size.
        gain: singular value of fresh ones.
        seed: of fresh values and topologies.

    Returns:
        A `ConvertReport`; what was skipped is in it with the reason.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no convolution can be converted, or ``last`` is not positive. The model is then as it was.

    Warns:
        StaleOptimizerWarning: if an optimizer that was made before holds the parameters that are replaced.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> report = convert_eco(net, torch.zeros(1, 3, 9, 9), last=1, seed=0)
        >>> report.skipped[0].reason, report.converted[0].exact
        ('not among the last 1', True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if last is not None and last < 1:
        raise ValueError(f"last counts convolutions, at least 1, got {last}")
    records: dict[str, ConvertRecord] = {}
    ready: list[_Call] = []
    calls = _record_calls(model, example_input)
    skipped = pick([(call.name, call.module, ["weight"]) for call in calls], include, exclude)
    tied = _tied(model)
    for call, unwanted in zip(calls, skipped):
        reason = "its weight is tied to another module's" if call.module in tied else _obstacle(call, only_exact)
        reason = reason or unwanted
        if reason is None:
            ready.append(call)
        records[call.name] = ConvertRecord(call.name, call.size, reason=reason)
    chosen = ready if last is None else ready[-last:]
    for call in ready[: len(ready) - len(chosen)]:
        records[call.name] = ConvertRecord(call.name, call.size, reason=f"not among the last {last}")
    if not chosen:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in list(records.values())[:6]) or "it runs no convolution"
        raise ValueError(f"no convolution of {type(model).__name__} can be converted ({reasons})")
    base = base_seed(seed)
    made = [(call, _eco_form(call, gain, int(named_generator(base, call.name).initial_seed()))) for call in chosen]
    warn_replaced([p for call, _ in made for p in call.module._parameters.values()], "convert_eco")
    for call, layer in made:
        exact = all(layer.exact_at(size) for size, _ in call.sizes)
        records[call.name] = ConvertRecord(call.name, call.size, layer.groups, exact)
        # A module may be in the model under several names.
        for parent in list(model.modules()):
            for child in [name for name, module in parent._modules.items() if module is call.module]:
                setattr(parent, child, layer)
    return ConvertReport(tuple(records.values()), "convert_eco")


def _record_calls(model: nn.Module, example_input: Any) -> list[_Call]:
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name}
    calls: dict[str, _Call] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        size, out = ((int(t.shape[-2]), int(t.shape[-1])) for t in (inputs[0], output))
        calls.setdefault(names[module], _Call(names[module], module, [])).sizes.append((size, out))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with evaluating(model), torch.no_grad():
            run(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


def _tied(model: nn.Module) -> set[nn.Module]:
    """The modules that have a parameter in common with another: each would get one of its own."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return {module for several in owners.values() if len(several) > 1 for module in several}


def _obstacle(call: _Call, only_exact: bool) -> str | None:
    conv = call.module
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} has a forward of its own"
    if parametrize.is_parametrized(conv):
        return "its weight is parametrized"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    stride = conv.stride[0]
    if conv.stride[1] != stride:
        return f"stride {tuple(conv.stride)}"
    for size, out in call.sizes:
        if any(n % stride or n // stride != m for n, m in zip(size, out)):
            return f"its output is {out} on {size}, not the input size divided by its stride {stride}"
        fits = all((n // stride) % k == 0 or k % (n // stride) == 0 for n, k in zip(size, conv.kernel_size))
        if only_exact and not fits:
            return f"kernel size {tuple(conv.kernel_size)} does not divide the input size {size}"
    mask = conv._buffers.get("weight_mask")
    if mask is not None:
        try:
            topology = BlockTopology.from_mask(mask.flatten(2).any(2))
        except NotBlockStructuredError:
            return "its mask is not made of blocks"
        if -1 in topology.row_set or -1 in topology.col_set:
            return "its mask leaves channels without any kernel"
    return None


def _eco_form(call: _Call, gain: float, seed: int) -> ECOConv2d:
    conv = call.module
    weight, mask = current(conv, "weight"), conv._buffers.get("weight_mask")
    topology = None if mask is None else BlockTopology.from_mask(mask.flatten(2).any(2))
    stride = conv.stride[0]
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    layer = ECOConv2d(
        conv.in_channels,
        conv.out_channels,
        kernel,
        stride,
        topology.groups if topology is not None else 1,
        call.size,
        conv.bias is not None,
        gain=gain,
        topology=topology if topology is not None and stride == 1 else "ramanujan",
        seed=seed,
        device=weight.device,
        dtype=weight.dtype,
    )
    if conv.bias is not None and layer.bias is not None:
        layer.bias.data.copy_(conv.bias.detach())
        layer.bias.requires_grad_(conv.bias.requires_grad)
    if topology is not None and stride == 1:
        _keep_eco_values(layer, weight)
    stored = conv._parameters.get("weight" if mask is None else "weight_orig")
    layer.weight.requires_grad_(stored is None or stored.requires_grad)
    return layer.train(conv.training)


def _keep_eco_values(layer: ECOConv2d, weight: Tensor) -> None:
    """Take over the kernel if it is orthogonal at every frequency."""
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    flat = weight.flatten(2).reshape(-1, prod(kernel))
    blocks = tuple(
        flat[i.to(flat.device)].view(*b.shape, -1) for i, b in zip(layer.topology.flat_index, layer.topology.buckets)
    )
    values = torch.cat([torch.linalg.svdvals(frequencies_from_kernel(b, kernel).double()).flatten() for b in blocks])
    gain = float(values.mean())
    if gain > 0 and bool((values - gain).abs().max() < 1e-4 * gain):
        layer.weight.data.copy_(pack(blocks, kernel))
        layer.gain = gain
