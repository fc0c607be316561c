"""The parametrization behind `hold`: a weight whose blocks are orthogonal, whatever its free parameters are."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ._torch import is_wrapped, unwrapped
from .layouts import Layout, double, halve
from .topology import BlockTopology, decode_sets, encode_sets, real_values
from .weights import Mirror

# Not "householder": it keeps signs in a parameter, which weight decay turns into zeros.
OrthogonalMap = Literal["cayley", "matrix_exp"]

_FORMAT = 1
_MIRRORS: tuple[Mirror | None, ...] = (None, Mirror.ENTRY, Mirror.EXIT, Mirror.INNER)
_HALF = (torch.float16, torch.bfloat16)


class Rotation(nn.Module):
    """Matrices of one shape, each a fixed orthogonal one times a rotation that free parameters choose.

    The strict lower triangle of a parameter gives a skew-symmetric ``A``; the rotation is the Cayley transform
    ``(I - A/2)^-1 (I + A/2)`` or the exponential ``exp(A)``, and the identity at zero (a dynamic trivialization,
    Lezcano-Casado 2019, https://arxiv.org/abs/1909.09501). It is computed in float32 at least, and the fixed matrices
    stay so in a model that is cast to half precision.

    Args:
        shape: ``(batch, r, c)`` of the matrices and of the parameter; semi-orthogonal where ``r != c``.
        kind: which map.
        like: a tensor with the parameter's dtype and device.
    """

    base: Tensor

    def __init__(self, shape: Sequence[int], kind: OrthogonalMap, like: Tensor) -> None:
        super().__init__()
        batch, rows, cols = shape
        self.kind, self.wide = kind, rows < cols
        size = max(rows, cols)
        identity = torch.eye(size, dtype=precise(like.dtype), device=like.device)
        self.register_buffer("base", identity.repeat(batch, 1, 1))

    def forward(self, free: Tensor) -> Tensor:
        with torch.autocast(free.device.type, enabled=False):
            x = free.to(precise(free.dtype))
            x = x.mT if self.wide else x
            rows, cols = x.shape[-2:]
            lower = F.pad(x.tril(-1), (0, rows - cols))
            skew = lower - lower.mT
            if self.kind == "cayley":
                identity = torch.eye(rows, dtype=x.dtype, device=x.device)
                # Never singular, so nothing has to be checked, which on a GPU would wait for it.
                turned = torch.linalg.solve_ex(identity - skew / 2, (identity + skew / 2)[..., :cols]).result
            else:
                turned = torch.linalg.matrix_exp(skew)[..., :cols]
            q = self.base.to(x.dtype) @ turned
            return q.mT if self.wide else q

    def rebase(self, matrices: Tensor) -> Tensor:
        """Go out from the orthogonal matrices nearest to the given ones; returns the parameter, zero, for that."""
        tall = (matrices.mT if self.wide else matrices).detach().double()
        u, values, v = torch.linalg.svd(tall, full_matrices=False)
        nearest = tall if bool((values - 1).abs().max() < 1e-5) else u @ v
        complete = torch.linalg.qr(nearest, mode="complete").Q
        base = torch.cat([nearest, complete[..., nearest.shape[-1] :]], -1)
        self.base = base.to(self.base)
        return torch.zeros_like(matrices)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.base
        super()._apply(fn, recurse)
        if self.base.dtype in _HALF:
            self.base = before.to(self.base.device)
        return self


class Held(nn.Module):
    """A weight as a function of free parameters: one `Rotation` for each bucket of blocks.

    Where the blocks lie, their gain and their mirroring are part of the state dict (one tensor of integers, written
    anew each time), so that a state loaded into another held model brings its own. A buffer, which is no part of the
    state, says the same in codes (`sao_prune.topology.encode_sets`), so that averages leave it right: what is written
    into it is followed, as DDP writes what rank 0 has, and parameters that are lent for one call
    (`torch.func.functional_call`) by a model held in other blocks are refused.
    """

    codes: Tensor
    _own: Tensor
    _seen: Tensor

    def __init__(
        self, layout: Layout, weight: Tensor, kind: OrthogonalMap, gain: float, mirrors: Sequence[Mirror | None]
    ):
        super().__init__()
        self.layout, self.gain, self.mirrors = layout, gain, tuple(mirrors)
        halves = [halve(b, m) for b, m in zip(layout.split(weight), mirrors)]
        self.maps = nn.ModuleList(Rotation(h.shape, kind, weight) for h in halves)
        self.register_buffer("codes", None, persistent=False)
        self._put_codes(weight.device)

    def forward(self, *free: Tensor) -> Tensor:
        self._follow()
        blocks = (rotate(x) * self.gain for rotate, x in zip(self.maps, free))
        return self.layout.join(tuple(double(b, m) for b, m in zip(blocks, self.mirrors))).to(free[0].dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The free parameters of the nearest weight that is held; the maps go out from it."""
        blocks = self.layout.split(weight.detach().to(precise(weight.dtype)))
        halves = (halve(b, m) / self.gain for b, m in zip(blocks, self.mirrors))
        return tuple(rotate.rebase(h).to(weight.dtype) for rotate, h in zip(self.maps, halves))  # type: ignore[operator]

    def get_extra_state(self) -> Tensor:
        """Topologies, gain and mirroring, int32."""
        self._follow()
        numbers = [_FORMAT, *struct.unpack("<2i", struct.pack("<d", self.gain)), *self._places()]
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")

    def _places(self) -> list[int]:
        numbers = [len(self.layout.parts)]
        for topology in self.layout.parts:
            numbers += [*topology.shape, *topology.row_set.tolist(), *topology.col_set.tolist()]
        return numbers + [_MIRRORS.index(m) for m in self.mirrors]

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave.

        Raises:
            ValueError: if it is no such tensor, or of blocks of other shapes.
        """
        self._take_over(*_read(state))
        self._put_codes(self.codes.device)

    def _take_over(self, gain: float, parts: list[BlockTopology], mirrors: tuple[Mirror | None, ...]) -> None:
        if not self.layout.fits(parts) or mirrors != self.mirrors:
            raise ValueError("the state is of a layer that is held in blocks of other shapes or mirrored otherwise")
        self.layout, self.gain = self.layout.onto(parts), gain

    def _put_codes(self, device: torch.device) -> None:
        with real_values():
            # The gain in parts of 16 bits, which float32 averages exactly enough.
            words = [*struct.unpack("<4H", struct.pack("<d", self.gain)), *self._places()]
            self.codes = encode_sets(torch.tensor(words, device="cpu")).to(device)
            self.__dict__.update(_own=self.codes, _seen=self.codes.clone())

    def _follow(self) -> None:
        """Take over what was written into the codes, and refuse those that came with parameters lent for a call.

        Raises:
            RuntimeError: if the parameters are of a model that is held in other blocks.
        """
        codes = self.codes
        if torch.compiler.is_compiling() or type(codes) is not Tensor or codes.is_meta:
            return
        with real_values():
            while is_wrapped(codes):
                codes = unwrapped(codes)
            if codes is self._own and torch.equal(codes, self._seen):
                return
            told = decode_sets(codes)
            if codes is not self._own and bool((told != decode_sets(self._seen)).any()):
                raise RuntimeError(
                    "these parameters are of a model that is held in other blocks or at another gain: load_state_dict "
                    "takes the blocks over, a call with parameters of another model cannot"
                )
            if codes is self._own:
                gain = struct.unpack("<d", struct.pack("<4H", *told[:4].tolist()))[0]
                self._take_over(*_parse(gain, iter(told[4:].tolist())))
                self.__dict__["_seen"] = codes.clone()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._follow()
        super()._apply(fn, recurse)
        self._put_codes(self.codes.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # As a message among those of the whole model, not as an exception in the middle of loading it.
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        except ValueError as error:
            error_msgs.append(f"{prefix}_extra_state: {error}")


def held_tensors(module: nn.Module) -> list[str]:
    """Names of a module's own tensors that are held."""
    return [tensor for tensor, chain in _chains(module) if any(isinstance(step, Held) for step in chain)]


def put(module: nn.Module, tensor: str, held: Held) -> None:
    """Hold a tensor of a module, in place."""
    if parametrize.is_parametrized(module):
        _own_class(module)
    parametrize.register_parametrization(module, tensor, held, unsafe=True)
    type(module).__deepcopy__ = _deepcopy  # type: ignore[attr-defined]


def take_off(module: nn.Module, tensor: str) -> None:
    """Make a held tensor a plain parameter again, with its present values, in place."""
    _own_class(module)
    trained = any(p.requires_grad for p in module.parametrizations[tensor].parameters())  # type: ignore[index, union-attr]
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    # torch makes a buffer of what takes no gradient just now: a frozen weight, or any under no_grad.
    value = getattr(module, tensor).detach()
    delattr(module, tensor)
    setattr(module, tensor, nn.Parameter(value, requires_grad=trained))


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no other shares.

    torch puts a property for each parametrized tensor on a class that it makes for the module, and copies share that
    class: taking the property from one of them would take it from all.
    """
    cls = type(module)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, names)


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> Any:
    """As torch's for parametrized modules, or the module's own; the copy gets a class of its own."""
    above = getattr(type(module).__bases__[0], "__deepcopy__", None)
    if above is not None:
        replica = above(module, memo)
    else:
        replica = type(module).__new__(type(module))
        memo[id(module)] = replica
        replica.__dict__.update(deepcopy(module.__dict__, memo))
    if parametrize.is_parametrized(replica):
        _own_class(replica)
    return replica


def _chains(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    if parametrize.is_parametrized(module):
        chains = module.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        for tensor, chain in chains.items():
            assert isinstance(chain, nn.ModuleList)
            yield tensor, chain


def _read(state: Any) -> tuple[float, list[BlockTopology], tuple[Mirror | None, ...]]:
    """Gain, topologies and mirroring out of an extra state."""
    if not isinstance(state, Tensor) or state.dtype != torch.int32 or state.dim() != 1:
        raise ValueError("the entry is not what hold wrote: a list of 32-bit integers")
    numbers = iter(state.tolist())
    try:
        if next(numbers) != _FORMAT:
            raise ValueError("the entry is of another version of hold")
        gain = struct.unpack("<d", struct.pack("<2i", next(numbers), next(numbers)))[0]
        return _parse(gain, numbers)
    except StopIteration:
        raise ValueError("the entry is damaged: it ends before its topologies do") from None


def _parse(gain: float, numbers: Iterator[int]) -> tuple[float, list[BlockTopology], tuple[Mirror | None, ...]]:
    parts = []
    try:
        for _ in range(next(numbers)):
            sizes = next(numbers), next(numbers)
            parts.append(BlockTopology(*(torch.tensor([next(numbers) for _ in range(n)], device="cpu") for n in sizes)))
        mirrors = tuple(_MIRRORS[number] for number in numbers)
    except (StopIteration, RuntimeError, IndexError):
        raise ValueError("the entry is damaged: it ends before its topologies do") from None
    if not gain > 0:
        raise ValueError(f"the entry is damaged: its gain is {gain}")
    return gain, parts, mirrors


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 in place of half precision."""
    return torch.float32 if dtype in _HALF else dtype
