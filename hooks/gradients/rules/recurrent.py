"""Rules for recurrent layers, whose steps are one operation.

The recurrence is computed again step by step, with zeros added to what the weights give to each
gate: the gradients with respect to these zeros are those a linear layer would see. Axes: T steps;
B examples; G gates of H units; I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.factors.outer import Outer
from sonde.hooks.model.walks import modules_of

from .places import Layout, UnsupportedError, Weight, remembered, widened

Cell: TypeAlias = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]
"""(gates of the inputs, gates of the hidden state, states) to the next states; the first is h."""


@contextmanager
def backward_through_recurrent(model: nn.Module) -> Iterator[None]:
    """Let gradients come back through the recurrent layers of a model in eval mode.

    cuDNN refuses that. Training mode without dropout computes the same, and it does not refuse.
    """
    layers = [m for m in modules_of(model) if isinstance(m, nn.RNNBase) and not m.training]
    dropouts = [layer.dropout for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.dropout = True, 0.0
        yield
    finally:
        for layer, dropout in zip(layers, dropouts, strict=True):
            layer.training, layer.dropout = False, dropout


@dataclass(frozen=True)
class _Weights:
    """The weights of one direction of one layer; `project` is of an LSTM with projections."""

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    project: Tensor | None = None


@dataclass(frozen=True)
class _Taps:
    """Zeros added to the gates, and what the weights were multiplied with, [T, B, …]."""

    input_gates: Tensor
    hidden_gates: Tensor
    inputs: Tensor
    hidden: list[Tensor]
    projected: Tensor | None
    to_project: list[Tensor]


@dataclass(frozen=True)
class _Gradients:
    """Of each direction, those with respect to its taps; and those of each first state."""

    directions: list[tuple[_Taps, list[Tensor]]]
    states: list[Tensor]


@dataclass(frozen=True)
class _Sequences:
    """What a recurrent layer was given: [T, B, I], and which steps each example has."""

    inputs: Tensor
    is_there: Tensor | None
    to_steps: Callable[[Tensor], Tensor]
    to_examples: Callable[[Tensor], Tensor]


def _layers(cell: Cell, layout: Layout, *args: Any) -> list[Weight]:
    """Return the weights of a recurrent layer, packed or not.

    Raises:
        UnsupportedError: If it draws random numbers.
    """
    is_packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    data, *rest = args
    sizes = rest.pop(0) if is_packed else None
    states, params, has_biases, num_layers, dropout, train, is_bidirectional, *last = rest
    if train and dropout > 0 and num_layers > 1:
        raise UnsupportedError("dropout between recurrent layers cannot be drawn again")
    is_batch_first = bool(last[0]) if last else False
    given = _sequences(layout, data.detach(), sizes, is_batch_first)
    initial = _states(states)
    num_directions = 2 if is_bidirectional else 1
    weights = list(_by_direction(params, has_biases, num_layers * num_directions))

    @remembered
    def found(deltas: Sequence[Tensor | None]) -> _Gradients:
        return _gradients(cell, given, initial, weights, num_directions, deltas)

    return [*_factors(weights, found, given.to_examples), *_of_states(states, found, 1)]


def _one_step(cell: Cell, layout: Layout, *args: Any) -> list[Weight]:
    """Return the weights of a single step."""
    data, states, inputs, hidden, *biases = args
    input_bias, hidden_bias = biases if biases else (None, None)
    if cell is _lstm_cell and layout.are_apart:
        cell = _lstm_cell_apart
    given = _sequences(layout, data.detach()[None], None, False)
    initial = [state[None] for state in _states(states)]
    weights = [_Weights(inputs, hidden, input_bias, hidden_bias)]

    @remembered
    def found(deltas: Sequence[Tensor | None]) -> _Gradients:
        lifted = [None, *(None if d is None else d[None] for d in deltas)]
        return _gradients(cell, given, initial, weights, 1, lifted)

    return [*_factors(weights, found, given.to_examples), *_of_states(states, found, 0)]


def _states(states: Any) -> list[Tensor]:
    return [widened(state.detach()) for state in _listed(states)]


def _listed(states: Any) -> Sequence[Tensor]:
    return states if isinstance(states, list | tuple) else [states]


def _sequences(
    layout: Layout, data: Tensor, sizes: Tensor | None, is_batch_first: bool
) -> _Sequences:
    if sizes is None:

        def turned(values: Tensor) -> Tensor:
            return widened(values).transpose(0, 1) if is_batch_first else widened(values)

        return _Sequences(turned(data), None, turned, lambda x: x.transpose(0, 1))
    unsorted = layout.unsorted

    def padded(values: Tensor) -> Tensor:
        return pad_packed_sequence(PackedSequence(widened(values), sizes))[0]

    def to_examples(values: Tensor) -> Tensor:
        first = values.transpose(0, 1)
        return first if unsorted is None else first[unsorted]

    inputs = padded(data)
    batch = torch.arange(inputs.shape[1], device="cpu")
    return _Sequences(
        inputs, (batch < sizes[:, None])[..., None].to(data.device), padded, to_examples
    )


def _by_direction(params: Sequence[Tensor], has_biases: bool, num: int) -> Iterator[_Weights]:
    size = len(params) // num
    for start in range(0, len(params), size):
        inputs, hidden, *rest = params[start : start + size]
        biases = [rest.pop(0), rest.pop(0)] if has_biases else [None, None]
        yield _Weights(inputs, hidden, biases[0], biases[1], rest[0] if rest else None)


def _gradients(
    cell: Cell,
    given: _Sequences,
    initial: list[Tensor],
    weights: list[_Weights],
    num_directions: int,
    deltas: Sequence[Tensor | None],
) -> _Gradients:
    """Compute the recurrence again; return the gradients with respect to all gates."""
    initial = [state.detach().requires_grad_() for state in initial]
    taps: list[_Taps] = []
    finals: list[list[Tensor]] = []
    with torch.enable_grad(), torch.autocast(given.inputs.device.type, enabled=False):
        current = given.inputs
        for first in range(0, len(weights), num_directions):
            directions = []
            for direction in range(num_directions):
                at = first + direction
                states = [state[at] for state in initial]
                outputs, final, tap = _run(
                    cell, weights[at], current, states, given.is_there, is_reverse=direction == 1
                )
                directions.append(outputs)
                finals.append(final)
                taps.append(tap)
            current = torch.cat(directions, 2) if num_directions > 1 else directions[0]
        results = [current, *(torch.stack(list(same)) for same in zip(*finals, strict=True))]
    given_deltas = [None if deltas[0] is None else given.to_steps(deltas[0])]
    given_deltas += [None if d is None else widened(d) for d in deltas[1:]]
    used = [(r, d) for r, d in zip(results, given_deltas, strict=False) if d is not None]
    wanted = [
        t
        for tap in taps
        for t in (tap.input_gates, tap.hidden_gates, tap.projected)
        if t is not None
    ] + initial
    found = iter(
        torch.autograd.grad(
            [r for r, _ in used], wanted, [d for _, d in used], materialize_grads=True
        )
    )
    sizes = [2 if tap.projected is None else 3 for tap in taps]
    of_taps = [
        (tap, [next(found) for _ in range(size)]) for tap, size in zip(taps, sizes, strict=True)
    ]
    return _Gradients(of_taps, list(found))


def _run(
    cell: Cell,
    weights: _Weights,
    inputs: Tensor,
    states: list[Tensor],
    is_there: Tensor | None,
    *,
    is_reverse: bool,
) -> tuple[Tensor, list[Tensor], _Taps]:
    """Run one direction of a layer over all steps."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else widened(tensor.detach())

    w_inputs, w_hidden, w_project = (
        wide(weights.inputs),
        wide(weights.hidden),
        wide(weights.project),
    )
    assert w_inputs is not None
    assert w_hidden is not None
    gates = F.linear(inputs, w_inputs, wide(weights.input_bias))
    input_zeros = torch.zeros_like(gates, requires_grad=True)
    hidden_zeros = torch.zeros_like(gates, requires_grad=True)
    gates = gates + input_zeros
    project_zeros = None
    if w_project is not None:
        shape = (*gates.shape[:2], w_project.shape[0])
        project_zeros = gates.new_zeros(shape).detach().requires_grad_()
    steps = range(len(inputs) - 1, -1, -1) if is_reverse else range(len(inputs))
    of_inputs, of_hidden = gates.unbind(0), hidden_zeros.unbind(0)
    of_project = None if project_zeros is None else project_zeros.unbind(0)
    outputs: list[Any] = [None] * len(inputs)
    hidden: list[Any] = [None] * len(inputs)
    to_project: list[Any] = [None] * len(inputs)
    for step in steps:
        hidden[step] = states[0].detach()
        from_hidden = F.linear(states[0], w_hidden, wide(weights.hidden_bias)) + of_hidden[step]
        new = cell(of_inputs[step], from_hidden, states)
        if w_project is not None and of_project is not None:
            to_project[step] = new[0].detach()
            new = [F.linear(new[0], w_project) + of_project[step], *new[1:]]
        if is_there is not None:
            there = is_there[step]
            new = [torch.where(there, n, old) for n, old in zip(new, states, strict=True)]
        states = new
        outputs[step] = states[0] if is_there is None else states[0] * is_there[step]
    taps = _Taps(input_zeros, hidden_zeros, inputs.detach(), hidden, project_zeros, to_project)
    return torch.stack(outputs), states, taps


def _factors(
    weights: Sequence[_Weights],
    gradients: Callable[[Any], _Gradients],
    to_examples: Callable[[Tensor], Tensor],
) -> Iterator[Weight]:
    def outer(delta: Tensor, inputs: Tensor) -> Factor:
        source = to_examples(inputs)
        positions = to_examples(delta)
        return Outer(positions[:, None], source[:, None], source.shape[2], lambda x: x).compact()

    def of_inputs(at: int, deltas: Any) -> Factor:
        taps, found = gradients(deltas).directions[at]
        return outer(found[0], taps.inputs)

    def of_hidden(at: int, deltas: Any) -> Factor:
        taps, found = gradients(deltas).directions[at]
        return outer(found[1], torch.stack(taps.hidden))

    def of_projection(at: int, deltas: Any) -> Factor:
        taps, found = gradients(deltas).directions[at]
        return outer(found[2], torch.stack(taps.to_project))

    def of_bias(at: int, which: int, deltas: Any) -> Factor:
        return Dense(to_examples(gradients(deltas).directions[at][1][which]).sum(1))

    for at, of in enumerate(weights):
        yield Weight(of.inputs, partial(of_inputs, at))
        yield Weight(of.hidden, partial(of_hidden, at))
        yield Weight(of.input_bias, partial(of_bias, at, 0))
        yield Weight(of.hidden_bias, partial(of_bias, at, 1))
        yield Weight(of.project, partial(of_projection, at))


def _of_states(
    states: Any, gradients: Callable[[Any], _Gradients], row_axis: int
) -> Iterator[Weight]:
    """Yield the first states, which may be computed from a parameter: a row for each example."""

    def of_state(at: int, deltas: Any) -> Factor:
        return Dense(gradients(deltas).states[at].transpose(0, 1))

    for at, state in enumerate(_listed(states)):
        yield Weight(state, partial(of_state, at), row_axis)


def _lstm_cell(of_inputs: Tensor, of_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    entry, forget, new, out = (of_inputs + of_hidden).chunk(4, -1)
    memory = forget.sigmoid() * states[1] + entry.sigmoid() * new.tanh()
    return [out.sigmoid() * memory.tanh(), memory]


def _lstm_cell_apart(of_inputs: Tensor, of_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    """The gradient of the memory has what came through the output already."""
    memory = _lstm_cell(of_inputs, of_hidden, states)[1]
    out = (of_inputs + of_hidden).chunk(4, -1)[3]
    return [out.sigmoid() * memory.detach().tanh(), memory]


def _gru_cell(of_inputs: Tensor, of_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    reset, update, new = of_inputs.chunk(3, -1)
    reset_hidden, update_hidden, new_hidden = of_hidden.chunk(3, -1)
    candidate = (new + (reset + reset_hidden).sigmoid() * new_hidden).tanh()
    kept = (update + update_hidden).sigmoid()
    return [(1 - kept) * candidate + kept * states[0]]


def _tanh_cell(of_inputs: Tensor, of_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [(of_inputs + of_hidden).tanh()]


def _relu_cell(of_inputs: Tensor, of_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [(of_inputs + of_hidden).relu()]


lstm = partial(_layers, _lstm_cell)
gru = partial(_layers, _gru_cell)
rnn_tanh = partial(_layers, _tanh_cell)
rnn_relu = partial(_layers, _relu_cell)
lstm_cell = partial(_one_step, _lstm_cell)
gru_cell = partial(_one_step, _gru_cell)
rnn_cell_tanh = partial(_one_step, _tanh_cell)
rnn_cell_relu = partial(_one_step, _relu_cell)
