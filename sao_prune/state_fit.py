"""Whether a state dict fits a model; asked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._torch import ConvNd
from .blocks import BlockModule
from .held import held_tensors
from .plain import why_not_plain
from .state_file import CheckpointError


def masked_names(state: Mapping[str, Tensor], own: set[str], pruned: set[str]) -> set[str]:
    """The weights of a checkpoint that come with a mask; buffers that merely sound like one are none."""
    named = {key[:-5] for key in state if key.endswith("_mask") and f"{key[:-5]}_orig" in state}
    return {name for name in named if name in pruned or f"{name}_orig" not in own}


def mask_of(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    """The mask of a pruned weight, by its full name."""
    path, _, tensor = name.rpartition(".")
    return getattr(modules[path], f"{tensor}_mask")


def check_held(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse a held weight where the other side's is none: their values are of different kinds.

    Raises:
        CheckpointError: naming the weight and what to do.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for tensor in held_tensors(module):
            name, own = f"{prefix}{tensor.removesuffix('_orig')}", f"{prefix}parametrizations.{tensor}."
            plain = {name, f"{name}_orig", *(f"{prefix}{other}" for other in ("blocks", "weight", "weight_orig"))}
            if not plain.isdisjoint(state):
                raise CheckpointError(
                    f"{name} is held in the model, not in the checkpoint: sao_prune.release(model) first"
                )
            if any(key.startswith(own) for key in state) and f"{own}0._extra_state" not in state:
                raise CheckpointError(
                    f"{own}0._extra_state: missing from the checkpoint, so where its blocks lie is unknown"
                )
    for key in state:
        path, found, rest = key.rpartition("parametrizations.")
        tensor = rest.partition(".")[0]
        owner = modules.get(path.removesuffix("."))
        if (
            found
            and key.endswith("._extra_state")
            and owner is not None
            and not parametrize.is_parametrized(owner, tensor)
        ):
            raise CheckpointError(
                f"{path}{tensor} is held in the checkpoint, not in the model: sao_prune.hold(model) first, or release "
                "before saving"
            )


def check_block_layers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse another topology for a block layer whose blocks are more than a parameter.

    Raises:
        CheckpointError: naming the layer.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if not isinstance(module, BlockModule) or f"{prefix}blocks" not in state:
            continue
        reason = why_not_plain(module)
        for name, own in (("row_set", module.row_set), ("col_set", module.col_set)) if reason else ():
            if not torch.equal(state.get(f"{prefix}{name}", own).cpu(), own.cpu()):
                raise CheckpointError(f"{path}: the checkpoint's blocks lie elsewhere than the model's, and {reason}")


def check_support(name: str, values: Tensor, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a baked weight whose zeros are elsewhere than the model's mask: little of it would be left.

    Raises:
        CheckpointError: naming the weight.
    """
    mask = mask_of(modules, name)
    if values.shape != mask.shape:
        return
    # Kernels stay whole; a stack of matrices has none.
    kernels = isinstance(modules[name.rpartition(".")[0]], ConvNd)
    units = (values != 0).flatten(2).any(2) if kernels else values != 0
    kept = (mask != 0).flatten(2).any(2) if kernels else mask != 0
    if units.float().mean() < 0.9 and bool((units & ~kept.cpu()).any()):
        raise CheckpointError(
            f"{name}: the checkpoint is sparse already, with other non-zeros than the model's mask; load it into an "
            "unpruned model instead"
        )


def check_fit(
    model: nn.Module, state: Mapping[str, Tensor], to_prune: list[str], masked: set[str], strict: bool
) -> None:
    """Refuse a state with entries of other shapes than the model's or, if it is strict, with others than the model's.

    Args:
        model: as it is.
        state: the checkpoint's entries.
        to_prune: dense weights that the checkpoint has masks for.
        masked: pruned weights that the checkpoint has no masks for.
        strict: whether entries may be neither missing nor unexpected.

    Raises:
        CheckpointError: naming the first ten.
    """
    own = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    for name in to_prune:
        shape = expected.pop(name, None)
        if shape is not None:
            expected[f"{name}_orig"] = expected[f"{name}_mask"] = shape
    problems = [
        f"{key}: the checkpoint has shape {tuple(state[key].shape)}, the model {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if strict:
        unseen = {f"{name}{suffix}" for name in masked for suffix in ("_orig", "_mask")}
        unseen |= {key for key in expected if key.endswith("num_batches_tracked")}
        missing = [key for key in expected if key not in state and key not in unseen]
        problems += [f"{key}: missing from the checkpoint" for key in missing]
        problems += [f"{name}: missing from the checkpoint" for name in masked if f"{name}_orig" not in state]
        problems += [f"{key}: the model has no such entry" for key in state if key not in expected]
    elif to_prune:
        problems += [f"{name}: the model has no such weight" for name in to_prune if f"{name}_orig" not in expected]
    if problems:
        more = f"\n  .. and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            "the checkpoint does not fit the model, which is unchanged:\n  " + "\n  ".join(problems[:10]) + more
        )


def check_masks(state: Mapping[str, Tensor], names: set[str]) -> None:
    """Refuse masks with other values than 0 and 1.

    Args:
        state: the checkpoint's entries.
        names: the weights that have masks.

    Raises:
        CheckpointError: naming the first.
    """
    for name in sorted(names):
        mask = state[f"{name}_mask"]
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(f"{name}_mask: holds values other than 0 and 1; the model is unchanged")
