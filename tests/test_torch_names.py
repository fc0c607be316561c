"""The private names of torch: all in one module, each there or with something as right in its place."""

import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sao_prune
from sao_prune import _torch

ROOT = Path(sao_prune.__file__).parent
PRIVATE = re.compile(r"torch(\.\w+)*\._[A-Za-z]\w*|from torch(\.\w+)* import _\w+")


def test_no_other_module_names_what_torch_keeps_for_itself() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {hit[0]}"
        for path in ROOT.rglob("*.py")
        if path != ROOT / "_torch.py"
        for hit in PRIVATE.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_what_is_missing_is_said_when_it_is_needed() -> None:
    assert _torch.private("_C._nothing", "this test", 3) == 3
    with pytest.raises(RuntimeError, match=r"has no torch\._C\._nothing, which this test needs"):
        _torch.private("_C._nothing", "this test")(1)


def test_transforms_are_seen() -> None:
    seen: list[tuple[Any, ...]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        inner = _torch.unwrapped(x)
        seen.append((_torch.transforms_active(), _torch._by_stack(), _torch.is_wrapped(x), _torch.is_batched(x)))
        seen.append((_torch.batch_dim(x), tuple(inner.shape)))
        with _torch.without_transforms():
            seen.append((_torch.is_wrapped(inner + 1),))
        return x

    torch.vmap(look, in_dims=1)(torch.ones(2, 3))
    assert seen == [(True, True, True, True), (1, (2, 3)), (False,)]
    assert not _torch.transforms_active()
    assert not _torch._by_stack()
    assert not _torch.is_wrapped(torch.ones(1))


def test_forward_mode_and_tracing_are_seen() -> None:
    assert _torch.forward_level() < 0
    with torch.autograd.forward_ad.dual_level():
        assert _torch.forward_level() == 0
    assert _torch.tracing_state() is None
    states: list[bool] = []
    torch.jit.trace(lambda x: (states.append(_torch.tracing_state() is not None), x)[1], torch.ones(1))
    assert states[0]


def test_modes_are_counted() -> None:
    counts = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert (_torch.dispatch_modes(), _torch.function_modes()) == (0, 0)
    with Mode(), FlopCounterMode(display=False):
        counts.append((_torch.dispatch_modes(), _torch.function_modes()))
        with _torch.without_functions():
            assert type(torch.ones(1).as_subclass(nn.Parameter) + 1) is torch.Tensor
    assert counts == [(1, 1)]


def test_subclasses_give_plain_tensors() -> None:
    for function in (_torch.disabled_torch_function, staticmethod(_torch._plain_function)):
        kind = type("Kind", (torch.Tensor,), {"__torch_function__": function})
        tensor = torch.ones(2).as_subclass(kind)
        assert type(tensor + 1) is torch.Tensor


def test_gradients_are_switched() -> None:
    for switch in (_torch.set_grad_enabled, torch.set_grad_enabled):
        switch(False)
        assert not torch.is_grad_enabled()
        switch(True)
        assert torch.is_grad_enabled()


def test_the_keys_after_autograd_are_a_key_set() -> None:
    assert type(_torch.after_autograd) is torch._C.DispatchKeySet


def test_tensors_tell_of_themselves() -> None:
    tensor = torch.ones(2)
    before = _torch.version(tensor)
    tensor.add_(1)
    assert (before, _torch.version(tensor)) == (0, 1)
    with torch.inference_mode():
        assert _torch.version(torch.ones(1)) is None
    assert _torch.identity(tensor) != _torch.identity(torch.ones(2))
    with torch._subclasses.FakeTensorMode():
        assert _torch.is_fake(torch.ones(1))
    assert not _torch.is_fake(tensor)


def test_bases_of_layers() -> None:
    with torch.device("meta"):
        convs = [nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)]
        norms = [nn.BatchNorm2d(1), nn.SyncBatchNorm(1), nn.InstanceNorm1d(1)]
    assert [isinstance(m, _torch.ConvNd) and isinstance(m, _torch._CONV | _torch._TRANSPOSED) for m in convs] == [
        True
    ] * 2
    assert [isinstance(m, _torch.ConvTransposeNd) for m in convs] == [False, True]
    assert [isinstance(m, _torch.BatchNorm) == isinstance(m, _torch._BATCH) for m in norms] == [True] * 3
    assert [isinstance(m, _torch.NormBase) for m in norms] == [True] * 3


def test_modes_are_left() -> None:
    with torch._subclasses.FakeTensorMode():
        with _torch.without_modes():
            real = torch.ones(1)
        assert not _torch.is_fake(real)


def test_memory_that_is_shared_is_known() -> None:
    tensor = torch.ones(4)
    for shared in (_torch.is_alias, _torch._shares_storage):
        assert shared(tensor[1:], tensor)
        assert not shared(tensor.clone(), tensor)
    assert not _torch.under_transforms()


def test_hooks_of_every_module_are_seen() -> None:
    assert not _torch.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _torch.has_global_hooks()
    finally:
        handle.remove()


def test_trees() -> None:
    pair = namedtuple("pair", "a b")
    tree = {"x": [1, (2, 3)], "y": pair(4, [5])}
    for leaves, mapped in ((_torch.tree_leaves, _torch.tree_map), (lambda t: list(_torch._leaves(t)), _torch._map)):
        assert leaves(tree) == [1, 2, 3, 4, 5]
        assert mapped(lambda n: -n, tree) == {"x": [-1, (-2, -3)], "y": pair(-4, [-5])}


@pytest.mark.parametrize(
    ("strategy", "draft"),
    [
        ({"_capture_strategy": "TorchExportDraftExportStrategy"}, True),
        ({"_capture_strategy": None}, False),
        ({}, False),
    ],
)
def test_drafts_are_known(strategy: dict[str, Any], draft: bool) -> None:
    assert _torch.is_draft(SimpleNamespace(**strategy)) is draft
