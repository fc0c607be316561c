"""Checkpoints and block layers: make a model fit a state dict with blocks in it, and the reverse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..discovery import PrunableWeight
from ..naming import dotted
from ..topology import BlockTopology, decode_sets
from .autotune import run_by_rule
from .forms import (
    CompositeForm,
    Form,
    Given,
    Ineligible,
    LayerForm,
    form_of,
    gather,
    given_empty,
    parameter_of,
    record_of,
    weights_of,
)
from .modules import BlockComposite, BlockLinear, BlockModule, Matrix, blocks_shape, child_name
from .swap import Changes, become, restore


def adopt(model: nn.Module, state: dict[str, Tensor]) -> Changes:
    """Turn the dense layers whose blocks a state dict holds into block layers, and read dense weights as blocks
    where the model has block layers.

    Args:
        model: changed in place.
        state: changed in place where the model is compact and the checkpoint is not.

    Returns:
        What `restore` needs to undo it.

    Raises:
        ValueError: naming the first layer that does not fit; nothing is changed then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in model.named_modules()}
    outer: dict[str, dict[str, dict[int | None, BlockTopology]]] = {
        path: {} for path, module in modules.items() for p in _paths(state) if _calls(module, modules.get(p))
    }
    forms: list[tuple[nn.Module, nn.Module]] = []
    for path in sorted(_paths(state)):
        topology, module = _topology(state, path), modules.get(path)
        if module is None:
            owner, tensor, part = _owner(path, modules)
            outer.setdefault(owner, {}).setdefault(tensor, {})[part] = topology
            continue
        shape = _matrix(module)
        if shape != topology.shape and not _holds(module, topology):
            raise ValueError(f"{path}: the checkpoint's layer is {_times(topology.shape)}, the model's {_times(shape)}")
        _check_blocks(path, state, blocks_shape(topology, _kernel(module)))
        if path == first[id(module)] and (not isinstance(module, BlockModule) or module.topology != topology):
            forms.append((module, _form(path, module, topology)))
    named = [(path, modules[path], tensors) for path, tensors in outer.items() if path == first[id(modules[path])]]
    whole = [(module, _composite(path, module, tensors, state)) for path, module, tensors in named]
    replaced = _blocks_from_dense(modules, state)
    changes: Changes = []
    try:
        for module, form in (*whole, *forms):
            changes.append(become(module, form))
    except BaseException:
        restore(changes)
        raise
    for key in [k for k in state if k in replaced[1]]:
        del state[key]
    state.update(replaced[0])
    return changes


def _calls(module: nn.Module, inner: nn.Module | None) -> bool:
    """Whether a dense layer has to be in its block form because a layer inside it is to be."""
    form = None if inner is None else form_of(module)
    return form is not None and any(inner is joined for joined in form.joins(module))


def _owner(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str, int | None]:
    """The layer with several weights, the weight and its part that a block layer of a checkpoint stands for."""
    part = None
    owner, _, name = path.rpartition(".")
    if name.isdigit() and owner not in modules:
        part, (owner, _, name) = int(name), owner.rpartition(".")
    module = modules.get(owner)
    if isinstance(module, BlockComposite):
        raise ValueError(f"{path}: the checkpoint's {name} is compact, the model's is not: expand the model first")
    tensors = [] if module is None else [w.tensor for w in weights_of(module) if child_name(w.tensor) == name]
    if not tensors:
        raise ValueError(f"{path or 'the model'}: the checkpoint has a compact layer, the model no such module")
    return owner, tensors[0], part


def _holds(module: nn.Module, topology: BlockTopology) -> bool:
    """Whether a block layer for several matrices can have them apart instead of stacked, or the reverse."""
    if not isinstance(module, BlockLinear):
        return False
    rows, cols = module.weight_shape
    return topology.shape in ((rows, cols), (rows, cols * module.copies * module.stacked))


def _form(path: str, module: nn.Module, topology: BlockTopology) -> nn.Module:
    """A layer with one weight in its block form, without values."""
    if isinstance(module, BlockModule):
        block = module.__class__.__new__(module.__class__)
        block.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
        shape = blocks_shape(topology, module.weight_shape[2:])
        values = torch.empty(shape, dtype=module.blocks.dtype, device=module.blocks.device)
        if isinstance(block, BlockLinear):
            copies = topology.shape[1] // block.in_features
            block.__dict__.update(copies=copies, stacked=block.copies * block.stacked // copies)
        block.set_topology(topology, nn.Parameter(values, module.blocks.requires_grad))
        if not block.execution.dense:
            run_by_rule(block)
        return block
    form = _checked(path, module, LayerForm)
    parts = int(getattr(module, "groups", 1))
    given = _given(module, weights_of(module)[0], _split(topology, parts, parts))
    new = form.block(module, {"weight": given})
    assert isinstance(new, BlockModule)
    run_by_rule(new)
    return new


def _composite(
    path: str, module: nn.Module, tensors: dict[str, dict[int | None, BlockTopology]], state: Mapping[str, Tensor]
) -> nn.Module:
    """A layer with several weights in its block form, without values."""
    form = _checked(path, module, CompositeForm)
    given = {}
    for weight in weights_of(module):
        found = tensors.get(weight.tensor)
        if found is None:
            continue
        copies = 1
        if None in found:
            rows, cols = found[None].shape
            copies = cols // weight.matrix[1]
            topologies = _split(found[None], weight.parts, copies)
            shape = rows // weight.parts, cols // copies
        else:
            topologies = [topology for _, topology in sorted(found.items(), key=lambda item: item[0] or 0)]
            shape = topologies[0].shape
        if shape != weight.matrix or len(topologies) != weight.parts or copies not in (1, weight.parts):
            raise ValueError(
                f"{dotted(path, weight.tensor)}: the checkpoint's has {len(topologies)} matrices of {_times(shape)}, "
                f"the model's {weight.parts} of {_times(weight.matrix)}"
            )
        given[weight.tensor] = _given(module, weight, topologies)
    block = form.block(module, given)
    assert isinstance(block, BlockComposite)
    for matrix in block.matrices():
        _check_blocks(dotted(path, matrix.path), state, tuple(matrix.layer.blocks.shape))
    run_by_rule(block)
    return block


def _checked(path: str, module: nn.Module, kind: type[Form]) -> Form:
    form = form_of(module)
    try:
        if form is None or not isinstance(form, kind):
            raise Ineligible(f"no block form of {type(module).__name__}")
        form.check(module, meta=True)
    except Ineligible as reason:
        raise ValueError(f"{path}: the checkpoint's layer is compact, the model's cannot be: {reason}") from None
    return form


def _given(module: nn.Module, weight: PrunableWeight, topologies: Sequence[BlockTopology]) -> Given:
    like = parameter_of(module, weight.tensor)
    assert like is not None
    return given_empty(tuple(topologies), weight.kernel, like, f"{weight.tensor}_mask" in module._buffers)


def _split(topology: BlockTopology, parts: int, copies: int) -> list[BlockTopology]:
    """The topologies of ``parts`` matrices that stand above each other, or with ``copies`` on a diagonal."""
    rows = topology.row_set.chunk(parts)
    cols = topology.col_set.chunk(copies) if copies > 1 else [topology.col_set] * parts
    return [BlockTopology(r, c) for r, c in zip(rows, cols)]


def _blocks_from_dense(
    modules: Mapping[str, nn.Module], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """For block layers whose dense weight a checkpoint holds: their entries, and the entries that those replace."""
    new: dict[str, Tensor] = {}
    old: set[str] = set()
    for path, tensor, weight, layers in _stored(modules):
        names = [name for name in (tensor, f"{tensor}_orig") if dotted(path, name) in state]
        if not names or any(dotted(path, dotted(m.path, "blocks")) in state for m in layers):
            continue
        key = dotted(path, names[0])
        values, mask = state[key], state.get(dotted(path, f"{tensor}_mask"))
        if tuple(values.shape) != weight.shape:
            raise ValueError(f"{key}: the checkpoint has shape {tuple(values.shape)}, the model {weight.shape}")
        entries = (values if mask is None else mask) != 0
        if weight.kernel:
            entries = entries.flatten(2).any(2, keepdim=True).view(*entries.shape[:2], *[1] * len(weight.kernel))
            entries = entries.expand_as(values)
        inside = sum(int(_read(weight, entries, m).sum()) for m in layers)
        if float(entries.float().mean()) < 0.9 and inside != int(entries.sum()):
            raise ValueError(
                f"{path}: the checkpoint is sparse elsewhere than the model's blocks; expand the model, or load into "
                "a dense one"
            )
        for m in layers:
            prefix = dotted(path, m.path)
            sets = {dotted(prefix, "row_set"): m.layer.row_set, dotted(prefix, "col_set"): m.layer.col_set}
            new.update({dotted(prefix, "blocks"): _read(weight, values, m), **sets})
        old |= {dotted(path, name) for name in (tensor, f"{tensor}_orig", f"{tensor}_mask")}
    return new, old


def _stored(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, PrunableWeight, list[Matrix]]]:
    """Path, name and dense form of every weight that is blocks, and the block layers that it is in."""
    inner: set[int] = set()
    for path, module in modules.items():
        if isinstance(module, BlockComposite):
            for tensor, weight in module.compact_records.items():
                layers = [m for m in module.matrices() if m.tensor == tensor]
                inner |= {id(m.layer) for m in layers}
                yield path, tensor, weight, layers
        elif isinstance(module, BlockModule) and id(module) not in inner:
            yield path, "weight", record_of(module), [Matrix("", "weight", None, module)]  # type: ignore[arg-type]


def _read(weight: PrunableWeight, tensor: Tensor, matrix: Matrix) -> Tensor:
    return gather(weight, tensor, matrix.layer.topology, matrix.part, matrix.layer.parts)


def _check_blocks(path: str, state: Mapping[str, Tensor], expected: tuple[int, ...]) -> None:
    given = tuple(state[dotted(path, "blocks")].shape)
    if given != expected:
        raise ValueError(f"{path}.blocks: the checkpoint has shape {given}, expected {expected}")


def _paths(state: Mapping[str, Tensor]) -> set[str]:
    """Paths of the block layers in a state dict."""
    paths = {key.rpartition(".")[0] for key in state if key.rpartition(".")[2] == "row_set"}
    return {p for p in paths if dotted(p, "col_set") in state and dotted(p, "blocks") in state}


def _topology(state: Mapping[str, Tensor], path: str) -> BlockTopology:
    sets = []
    for name in ("row_set", "col_set"):
        stored = state[dotted(path, name)]
        if stored.dtype not in (torch.uint8, torch.int32) or stored.dim() != 1:
            raise ValueError(f"{dotted(path, name)}: {stored.dtype} of shape {tuple(stored.shape)} is no list of sets")
        sets.append(decode_sets(stored))
    topology = BlockTopology(*sets) if all(map(len, sets)) else None
    if topology is None or not topology.groups:
        raise ValueError(f"{path or 'the model'}: row_set and col_set of the checkpoint have no block")
    return topology


def _matrix(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, BlockModule):
        return module.topology.shape
    weights = weights_of(module)
    if not isinstance(form_of(module), LayerForm) or not weights:
        weight = parameter_of(module, "weight")
        return () if weight is None else tuple(weight.shape[:2])
    rows, cols = weights[0].matrix
    return rows * weights[0].parts, cols * weights[0].parts


def _kernel(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight_shape[2:] if isinstance(module, BlockModule) else weights_of(module)[0].kernel)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "no matrix"
