"""Results of the kernels never share memory that is in use, and what is kept for them has a bound."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune.blocks import BlockLinear, Execution, release_memory
from sao_prune.blocks.backends.cpu import memory
from sao_prune.topology import interleaved

from .cases import needs_compiler

MIB = 1 << 18  # numbers of a MiB


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> memory.Pool:
    pool = memory.Pool()
    monkeypatch.setattr(memory, "_pool", pool)
    return pool


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 3, 8, 20])), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_two_share_memory_and_what_is_held_has_a_bound(steps: list[tuple[int, int]]) -> None:
    pool, held, most = memory.Pool(), {}, 0
    for number, (place, size) in enumerate(steps):
        held.pop(place, None)
        array = pool.array(size * MIB)
        array[:] = number
        held[place] = array, number
        del array
        most = max(most, pool.in_use)
        assert pool.in_use + pool.idle <= 2 * most
        assert pool.in_use <= 2 * sum(a.nbytes for a, _ in held.values())
    assert all((array == number).all() for array, number in held.values())


def test_memory_comes_back_when_the_last_view_is_gone(fresh: memory.Pool) -> None:
    x = memory.empty((4, MIB))
    where, row = x.data_ptr(), x[2].view(2, -1)
    del x
    assert memory.empty((4, MIB)).data_ptr() != where
    del row
    gc.collect()
    assert fresh.in_use == 0
    assert memory.empty((4, MIB)).data_ptr() in (where, memory.empty((4, MIB)).data_ptr())
    assert fresh.idle > 0
    release_memory()
    assert fresh.idle == 0


@pytest.mark.parametrize(
    ("shape", "order", "strides"), [((300, 2000), None, (2000, 1)), ((300, 2000), (1, 0), (1, 300))]
)
def test_strides(shape: tuple[int, int], order: tuple[int, int] | None, strides: tuple[int, int]) -> None:
    x = memory.empty(shape, order)
    assert (tuple(x.shape), x.stride(), x.dtype, x.device.type) == (shape, strides, torch.float32, "cpu")
    assert memory.empty_like(x).stride() == strides
    assert memory.empty((3, 5), order).stride() == ((5, 1) if order is None else (1, 3))
    assert not x._is_view()
    assert x.data_ptr() % 64 == 0


def test_like_an_expanded_tensor() -> None:
    x = torch.zeros(1, 2000).expand(300, 2000)
    assert memory.empty_like(x).fill_(1).sum() == x.numel()


def test_pages_like_those_of_an_image_in_channels_last_format() -> None:
    x = memory.empty((2, 64, 70, 60), (0, 2, 3, 1))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert memory.empty_like(x).is_contiguous(memory_format=torch.channels_last)


def _overwrite(pool: memory.Pool, array: np.ndarray) -> None:
    array[:] = 7
    pool.array(MIB)[:] = 7


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
def test_a_forked_process_writes_into_copies() -> None:
    pool = memory.Pool()
    array, idle = pool.array(MIB), pool.array(MIB)
    array[:], idle[:] = 1, 2
    address = idle.ctypes.data
    del idle
    child = multiprocessing.get_context("fork").Process(target=_overwrite, args=(pool, array))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert (array == 1).all()
    idle = pool.array(MIB)
    assert idle.ctypes.data == address
    assert (idle == 2).all()


def test_threads_get_memory_of_their_own() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            x = memory.empty((MIB,)).fill_(number)
            y = memory.empty((MIB,)).fill_(-number)
            if not (x.eq(number).all() and y.eq(-number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_compiler
def test_a_layer_uses_memory_again_and_results_that_are_kept_stay(fresh: memory.Pool) -> None:
    layer = BlockLinear(interleaved(1024, 1024, 32))
    layer.run_as(Execution(native=True))
    inputs = [torch.randn(512, 1024) for _ in range(3)]
    with torch.no_grad():
        kept = [layer(x) for x in inputs]
        copies = [y.clone() for y in kept]
        for x in inputs * 3:
            layer(x)
    assert all(torch.equal(y, copy) for y, copy in zip(kept, copies))
    assert fresh.in_use + fresh.idle <= 5 * kept[0].nbytes
    with torch.inference_mode():
        y = layer(inputs[0])
    assert y.is_inference()
    with pytest.raises(RuntimeError, match="version"):
        _ = y._version


@needs_compiler
def test_a_result_is_an_ordinary_tensor() -> None:
    layer = BlockLinear(interleaved(1024, 1024, 32))
    layer.run_as(Execution(native=True))
    y = layer(torch.randn(512, 1024, requires_grad=True))
    torch.nn.functional.relu_(y).sum().backward()
    shared = y.detach().clone()
    result = y.detach().share_memory_()
    assert torch.equal(result, shared)


def test_where_there_is_no_memory(fresh: memory.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.array(MIB)
    assert fresh.idle > 0

    def none(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "_map", none)
    with pytest.raises(MemoryError, match="no memory for a result of"):
        fresh.array(8 * MIB)
    assert fresh.idle == 0


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No cycle of references is broken meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _tensors(least: int) -> list[torch.Tensor]:
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.numel() >= least]


@pytest.mark.usefixtures("uncollected")
def test_nothing_that_was_drawn_is_kept() -> None:
    least = 24 * 96
    before = {id(t) for t in _tensors(least)}
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4)), nn.LayerNorm(96))
    sao_prune.apply(model, groups=4, seed=0, form="compact")
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not [tuple(t.shape) for t in _tensors(least) if id(t) not in own | before]


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("example", [True, False])
def test_dense_weights_go_when_layers_become_compact(example: bool) -> None:
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(5)), nn.LSTM(96, 96))
    sao_prune.apply(model, groups=4, seed=0)
    nn.utils.prune.random_unstructured(model[4], "weight", 0.5)  # has no block form, which is told by an exception
    kept = [weakref.ref(layer.weight_orig) for layer in model[1:3]]
    sao_prune.compact(model[:5], example_input=torch.randn(2, 96) if example else None)
    assert [ref() for ref in kept] == [None, None]
