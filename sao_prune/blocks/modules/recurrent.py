"""Recurrent layers with block weights: one product for the inputs of all steps, one a step for all gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..._torch import has_global_hooks
from ..epilogue import is_watched
from .base import is_plain
from .composite import BlockComposite

# Values of a dense step up to which torch's kernel for whole sequences is faster than blocks, measured at 96.875 %.
_SMALL_STEP = 1 << 18

State = tuple[Tensor, ...]


class _Recurrent(BlockComposite):
    input_size: int
    hidden_size: int

    def reset_parameters(self) -> None:
        """Draw the weights that are not blocks, and the biases, as torch does."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)


class BlockRNNBase(_Recurrent):
    """Base of `BlockLSTM`, `BlockGRU` and `BlockRNN`; inputs, states and results are those of torch's layers.

    The biases and the options (layers, directions, projection, dropout, ``batch_first``) are the dense layer's own.
    """

    mode: str
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """A sequence ``(time, batch, n)``, packed or without a batch too, and initial states, to results and states.

        Raises:
            RuntimeError: for shapes that are not those of the layer.
        """
        if isinstance(input, Proxy):
            return self.step(input, hx)  # type: ignore[no-any-return]
        if self._runs_dense(input):
            return self._dense_view().forward(input, hx)  # type: ignore[operator,no-any-return]
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes.tolist()
            states = self._initial(hx, input.data, sizes[0], input.sorted_indices)
            output, states = self._layers(input.data, sizes, states)
            packed = PackedSequence(output, *input[1:])
            return packed, self._final([_permuted(s, input.unsorted_indices) for s in states])
        if input.dim() not in (2, 3):
            raise RuntimeError(f"{type(self).__name__}: expected input of 2 or 3 dimensions, got {input.dim()}")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        steps, batch, _ = x.shape
        if not steps:
            raise RuntimeError(f"{type(self).__name__}: expected at least one step, got input {tuple(input.shape)}")
        if not batched and hx is not None:
            given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
            hx = tuple(h.unsqueeze(1) for h in given)
        states = self._initial(hx, x, batch, None)
        flat, states = self._layers(x.flatten(0, 1), [batch] * steps, states)
        output = flat.unflatten(0, (steps, batch))
        if not batched:
            return output.squeeze(1), self._final([s.squeeze(1) for s in states])
        return (output.transpose(0, 1) if self.batch_first else output), self._final(states)

    @property
    def has_small_steps(self) -> bool:
        """Whether a step is so little work that calls of operators take most of it."""
        steps = [m.layer.weight_shape for m in self.matrices() if m.tensor.startswith("weight_hh")]
        return all(rows * cols <= _SMALL_STEP for rows, cols in steps)

    def _runs_dense(self, input: Tensor | PackedSequence) -> bool:
        """Whether torch's kernel for whole sequences runs it, its weights filled up with zeros."""
        data = input.data if isinstance(input, PackedSequence) else input
        if torch.compiler.is_compiling() or is_plain(data) or has_global_hooks():
            return False
        return all(m.layer.execution.dense and not is_watched(m.layer) for m in self.matrices())

    def _dense_view(self) -> nn.Module:
        """The dense layer, its weights computed from the blocks."""
        kind: type[nn.Module] = self.__dict__["_dense_class"]
        view = kind.__new__(kind)
        weights = {m.tensor: m.layer.dense(m.layer.stored()) for m in self.matrices()}
        names: list[str] = self._flat_weights_names  # type: ignore[assignment]
        flat = [weights[name] if name in weights else getattr(self, name, None) for name in names]
        own = {**self.__dict__, "_modules": {}, "_forward_hooks": {}, "_forward_pre_hooks": {}}
        view.__dict__.update(own, _flat_weights=flat, _flat_weight_refs=[None] * len(flat))
        return view

    def _final(self, states: list[Tensor]) -> Any:
        return tuple(states) if self.mode == "LSTM" else states[0]

    def _initial(self, hx: Any, like: Tensor, batch: int, order: Tensor | None) -> list[Tensor]:
        """Initial states, one tensor ``(layers * directions, batch, size)`` each."""
        if like.shape[-1] != self.input_size:
            raise RuntimeError(f"{type(self).__name__}: expected {self.input_size} inputs, got {like.shape[-1]}")
        rows = self.num_layers * (2 if self.bidirectional else 1)
        own = self.proj_size or self.hidden_size
        shapes = [(rows, batch, own)] + [(rows, batch, self.hidden_size)] * (self.mode == "LSTM")
        if hx is None:
            return [like.new_zeros(shape) for shape in shapes]
        given = [hx] if isinstance(hx, Tensor) else list(hx)
        if [tuple(h.shape) for h in given] != shapes:
            found = [tuple(h.shape) for h in given]
            raise RuntimeError(f"{type(self).__name__}: expected states of shape {shapes}, got {found}")
        return [_permuted(h, order) for h in given]

    def _layers(self, x: Tensor, sizes: list[int], states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All layers over steps of ``sizes`` sequences each, one step after the other in ``x``."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        finals: list[State] = []
        for layer in range(self.num_layers):
            results = []
            for direction, suffix in enumerate(directions):
                start = tuple(s[layer * len(directions) + direction] for s in states)
                y, final = self._run(f"l{layer}{suffix}", x, sizes, start, backwards=direction == 1)
                results.append(y)
                finals.append(final)
            x = results[0] if len(results) == 1 else torch.cat(results, -1)
            if layer < self.num_layers - 1 and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return x, [torch.stack(parts) for parts in zip(*finals)]

    def _run(self, name: str, x: Tensor, sizes: list[int], start: State, *, backwards: bool) -> tuple[Tensor, State]:
        """One layer in one direction. Sequences are sorted by length: step ``t`` has the first ``sizes[t]`` of them."""
        inner = getattr(self, f"bias_hh_{name}", None)
        inputs = self.product(f"weight_ih_{name}", x, getattr(self, f"bias_ih_{name}", None))
        if inner is not None and self.mode != "GRU":
            inputs, inner = inputs + inner.to(inputs.dtype), None
        start = tuple(s.to(inputs.dtype) for s in start)
        pieces = inputs.split(sizes)
        results: list[Tensor] = [inputs] * len(sizes)
        ended: list[State] = []
        state = tuple(s[: sizes[-1]] for s in start) if backwards else start
        for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
            here, size = state[0].shape[0], sizes[t]
            if backwards and size > here:
                state = tuple(torch.cat([s, first[here:size]]) for s, first in zip(state, start))
            elif size < here:
                ended.append(tuple(s[size:] for s in state))
                state = tuple(s[:size] for s in state)
            state = _step(self, self.mode, f"weight_hh_{name}", pieces[t], inner, state)
            if self.proj_size:
                state = self.product(f"weight_hr_{name}", state[0]), state[1]
            results[t] = state[0]
        if ended:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended)))
        return torch.cat(results), state

    def flatten_parameters(self) -> None:
        """Nothing: models call it before they run, for torch's layers on a GPU."""

    def extra_repr(self) -> str:
        """Sizes and options."""
        names = ("num_layers", "batch_first", "dropout", "bidirectional", "proj_size")
        options = "".join(f", {n}={v}" for n in names if ((v := getattr(self, n)) and v != 1) or v is True)
        dense = super().extra_repr()
        return f"{self.input_size}, {self.hidden_size}{options}{f', {dense}' if dense else ''}"


def _step(layer: BlockComposite, mode: str, name: str, inputs: Tensor, bias: Tensor | None, state: State) -> State:
    """One step: the inputs' part of the gates and the state before, ``(batch, size)`` each, to the state after."""
    gates = layer.product(name, state[0], bias)
    if mode == "GRU":
        size = gates.shape[-1] // 3
        share = torch.sigmoid(inputs[..., : 2 * size] + gates[..., : 2 * size])
        reset, update = share.chunk(2, -1)
        new = torch.tanh(inputs[..., 2 * size :] + reset * gates[..., 2 * size :])
        return (new + update * (state[0] - new),)
    gates = inputs + gates
    if mode == "LSTM":
        i, f, g, o = gates.chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell
    return (torch.relu(gates) if mode == "RNN_RELU" else torch.tanh(gates),)


def _permuted(states: Tensor, order: Tensor | None) -> Tensor:
    return states if order is None else states.index_select(1, order)


class BlockLSTM(BlockRNNBase):
    """`torch.nn.LSTM` with block weights; made by `sao_prune.compact`."""


class BlockGRU(BlockRNNBase):
    """`torch.nn.GRU` with block weights; made by `sao_prune.compact`."""


class BlockRNN(BlockRNNBase):
    """`torch.nn.RNN` with block weights; made by `sao_prune.compact`."""


class BlockCell(_Recurrent):
    """Base of the block cells: one step, inputs and results those of torch's cells."""

    bias_ih: Tensor | None
    bias_hh: Tensor | None
    nonlinearity: str

    @property
    def mode(self) -> str:
        """Which step it computes, by torch's name."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Inputs ``(batch, n)`` or ``(n,)`` and the state before, to the state after.

        Raises:
            RuntimeError: for shapes that are not those of the layer.
        """
        if isinstance(input, Proxy):
            return self.step(input, hx)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{type(self).__name__}: expected input (batch, {self.input_size}), got {tuple(input.shape)}"
            )
        count = 2 if self.mode == "LSTM" else 1
        shape = (*input.shape[:-1], self.hidden_size)
        state = (input.new_zeros(shape),) * count if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if [tuple(s.shape) for s in state] != [shape] * count:
            found = [tuple(s.shape) for s in state]
            raise RuntimeError(f"{type(self).__name__}: expected {count} states of shape {shape}, got {found}")
        inputs = self.product("weight_ih", input, self.bias_ih)
        after = _step(self, self.mode, "weight_hh", inputs, self.bias_hh, state)
        return after if count > 1 else after[0]


class BlockLSTMCell(BlockCell):
    """`torch.nn.LSTMCell` with block weights; made by `sao_prune.compact`."""

    mode = "LSTM"


class BlockGRUCell(BlockCell):
    """`torch.nn.GRUCell` with block weights; made by `sao_prune.compact`."""

    mode = "GRU"


class BlockRNNCell(BlockCell):
    """`torch.nn.RNNCell` with block weights; made by `sao_prune.compact`."""

    @property
    def mode(self) -> str:
        """By the nonlinearity."""
        return "RNN_RELU" if self.nonlinearity == "relu" else "RNN_TANH"
