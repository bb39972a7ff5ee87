"""Rules: how an operation with a parameter gives the per-example gradients of that parameter.

A rule has the arguments of its function, behind the layout of the examples, and returns the
parameters among them, each with a function that makes its gradients of those with respect to the
outputs. What has no rule is evaluated again, for each example by itself, by `replayed`.

Axes: n examples; t positions; g groups; o outputs; i inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.factors.outer import Outer
from sonde.hooks.gradients.factors.rows import Rows

from .convolutions import conv, conv_transpose, over_channels
from .normalizations import batch_norm, group_norm, instance_norm, layer_norm, rms_norm, times
from .places import (
    Deltas,
    Layout,
    Place,
    UnsupportedError,
    Weight,
    remembered,
    row_axis_of,
    widened,
)
from .recurrent import (
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn_cell_relu,
    rnn_cell_tanh,
    rnn_relu,
    rnn_tanh,
)


@dataclass(frozen=True)
class Rule:
    """A rule for a function.

    Attributes:
        weights: (layout, *arguments of the function) to the parameters among them.
        is_last_word: What it refuses is not evaluated for each example by itself either.
        is_placed: The layout tells it where the examples are; else the function's arguments do.
    """

    weights: Callable[..., list[Weight]]
    is_last_word: bool = False
    is_placed: bool = True

    def __call__(self, layout: Layout, *args: Any, **kwargs: Any) -> list[Weight]:
        """Return the parameters among the arguments of a call."""
        return self.weights(layout, *args, **kwargs)


def _linear(layout: Layout, input: Tensor, weight: Tensor, bias: Any = None) -> list[Weight]:
    return _product(layout, input, weight, bias, is_transposed=False)


def _matmul(layout: Layout, input: Tensor, other: Tensor) -> list[Weight]:
    if other.ndim != 2 or input.ndim < 2:
        raise UnsupportedError("a product with anything but a matrix")
    return _product(layout, input, other, None, is_transposed=True)


def _addmm(
    layout: Layout, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[Weight]:
    if beta != 1 or alpha != 1 or input.ndim != 1:
        raise UnsupportedError("a scaled sum")
    return _product(layout, mat1, mat2, input, is_transposed=True)


def _product(
    layout: Layout, inputs: Tensor, weight: Tensor, bias: Any, *, is_transposed: bool
) -> list[Weight]:
    inputs = inputs.detach()

    @remembered
    def of_outputs(deltas: Deltas) -> tuple[Tensor, Dense | None]:
        """Return the gradients with respect to the outputs; as a factor, if of one position."""
        delta = layout.positions(deltas[0])
        return delta, Dense(delta[:, 0]) if delta.shape[1] == 1 else None

    def of_weight(deltas: Deltas) -> Factor:
        delta, of_one = of_outputs(deltas)
        source = layout.positions(inputs)[:, None]
        factor = Outer(delta[:, None], source, source.shape[-1], _as_is, is_transposed)
        factor.of_outputs = of_one  # Their products serve the bias, too.
        return factor.compact()

    def of_bias(deltas: Deltas) -> Factor:
        delta, of_one = of_outputs(deltas)
        return of_one or Dense(delta.sum(1))

    return [Weight(weight, of_weight), Weight(bias, of_bias)]


def _as_is(source: Tensor) -> Tensor:
    return source


def _embedding(
    layout: Layout,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Weight]:
    if scale_grad_by_freq:
        raise UnsupportedError("scale_grad_by_freq makes a gradient depend on the other examples")
    num_rows = len(weight)

    def of_weight(deltas: Deltas) -> Factor:
        rows = layout.by_example(input).reshape(layout.num_examples, -1)
        if padding_idx is not None:
            rows = torch.where(rows == padding_idx % num_rows, -1, rows)
        return Rows(rows, layout.positions(deltas[0]), num_rows)

    return [Weight(weight, of_weight)]


def _embedding_bag(
    layout: Layout,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[Weight]:
    if scale_grad_by_freq:
        raise UnsupportedError("scale_grad_by_freq makes a gradient depend on the other examples")
    num_rows = len(weight)
    rows, scales = input, per_sample_weights
    if offsets is not None:
        rows, scales = _bags(input, offsets, scales, include_last_offset)
    rows = rows if padding_idx is None else rows.masked_fill(rows == padding_idx % num_rows, -1)

    def of_weight(deltas: Deltas) -> Factor:
        delta = widened(deltas[0])
        is_there = rows >= 0
        if mode == "max":
            values = delta[:, None] * _first_of_largest(weight.detach()[rows], is_there)
        else:
            factors = is_there.to(delta.dtype)
            if mode == "mean":
                factors = factors / factors.sum(1, keepdim=True).clamp(min=1)
            if scales is not None:
                factors = factors * scales.detach()
            values = delta[:, None] * factors[..., None]
        n = layout.num_examples
        first, positions = layout.by_example(rows), layout.by_example(values)
        return Rows(first.reshape(n, -1), positions.reshape(n, -1, delta.shape[-1]), num_rows)

    return [Weight(weight, of_weight)]


def _first_of_largest(values: Tensor, is_there: Tensor) -> Tensor:
    """Return 1 at the largest value of each bag and feature, else 0; [bags, longest, features]."""
    apart = values.masked_fill(~is_there[..., None], -math.inf)
    largest = torch.zeros_like(values).scatter_(1, apart.argmax(1, keepdim=True), 1)
    return largest * is_there[..., None]


def _bags(
    indices: Tensor, offsets: Tensor, scales: Tensor | None, include_last: bool
) -> tuple[Tensor, Tensor | None]:
    """Bring bags that follow each other into rows, [bags, longest], padded with -1."""
    starts = offsets[:-1] if include_last else offsets
    ends = torch.cat([starts[1:], starts.new_tensor([len(indices)])])
    sizes = ends - starts
    column = torch.arange(max(1, int(sizes.max())), device=indices.device)
    is_there = column < sizes[:, None]
    at = (starts[:, None] + column).clamp(max=len(indices))
    # One more, where bags that end early may look.
    rows = F.pad(indices, (0, 1))[at].masked_fill(~is_there, -1)
    return rows, None if scales is None else F.pad(scales, (0, 1))[at]


def _prelu(layout: Layout, input: Tensor, weight: Tensor) -> list[Weight]:
    given = input.detach()

    def of_weight(deltas: Deltas) -> Factor:
        products = layout.maps(times(widened(given).clamp(max=0), deltas[0]))
        if weight.numel() == 1:
            return Dense(products.flatten(1).sum(1, keepdim=True))
        return Dense(over_channels(products))

    return [Weight(weight, of_weight)]


def _add(
    layout: Layout, input: Any, other: Any, *, alpha: float = 1, out: None = None
) -> list[Weight]:
    return [
        _broadcast(layout, input, lambda delta: delta),
        _broadcast(layout, other, lambda delta: delta * alpha),
    ]


def _sub(
    layout: Layout, input: Any, other: Any, *, alpha: float = 1, out: None = None
) -> list[Weight]:
    return [
        _broadcast(layout, input, lambda delta: delta),
        _broadcast(layout, other, lambda delta: delta * -alpha),
    ]


def _mul(layout: Layout, input: Any, other: Any, *, out: None = None) -> list[Weight]:
    def times(value: Any) -> Callable[[Tensor], Tensor]:
        scale = widened(value.detach()) if isinstance(value, Tensor) else value
        return lambda delta: delta * scale

    return [_broadcast(layout, input, times(other)), _broadcast(layout, other, times(input))]


def _broadcast(layout: Layout, tensor: Any, local: Callable[[Tensor], Tensor]) -> Weight:
    """Return the operand of an elementwise operation, whose gradient is summed to its shape."""
    if not isinstance(tensor, Tensor):
        return Weight(None, lambda deltas: Dense(deltas[0]))
    axis, num_axes = layout.axis, len(layout.shape)
    sizes = (1,) * (num_axes - tensor.ndim) + tuple(tensor.shape)
    row_axis = row_axis_of(layout, tensor)

    def factor(deltas: Deltas) -> Factor:
        if row_axis is None and sizes[axis] > 1:
            raise UnsupportedError("it has no place for the examples")
        delta = layout.by_example(local(widened(deltas[0])))
        if axis == 1:
            delta = delta[:, None]  # Each example has one row, and steps are positions.
        positions = [size for at, size in enumerate(sizes) if at != axis]
        summed = [1, *(at for at, size in enumerate(positions, 2) if size == 1)]
        return Dense(delta.sum(summed).reshape(len(delta), -1))

    return Weight(tensor, factor, row_axis)


def _cat(layout: Layout, tensors: Sequence[Tensor], dim: int = 0) -> list[Weight]:
    axis = dim % tensors[0].ndim
    if layout.place not in (Place.FIRST, Place.SECOND) or axis == layout.axis:
        raise UnsupportedError("examples are put behind each other")
    weights = []
    start = 0
    for tensor in tensors:
        part = (start, tensor.shape[axis])
        start += tensor.shape[axis]
        weights.append(_part_of(tensor, layout.axis, axis, part))
    return weights


def _part_of(tensor: Tensor, row_axis: int, axis: int, part: tuple[int, int]) -> Weight:
    def factor(deltas: Deltas) -> Factor:
        return Dense(widened(deltas[0]).narrow(axis, *part).movedim(row_axis, 0))

    return Weight(tensor, factor, row_axis)


# Modules of torch stand for functions, which users may call by themselves.
RULES: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(_linear),
    torch.matmul: Rule(_matmul),
    torch.mm: Rule(_matmul),
    Tensor.matmul: Rule(_matmul),
    Tensor.mm: Rule(_matmul),
    torch.addmm: Rule(_addmm),
    F.embedding: Rule(_embedding, is_last_word=True),
    F.embedding_bag: Rule(_embedding_bag, is_last_word=True),
    F.layer_norm: Rule(layer_norm),
    F.rms_norm: Rule(rms_norm),
    F.group_norm: Rule(group_norm),
    F.batch_norm: Rule(batch_norm),
    F.instance_norm: Rule(instance_norm),
    F.prelu: Rule(_prelu),
    torch.cat: Rule(_cat),
    torch.concat: Rule(_cat),
    torch.concatenate: Rule(_cat),
    torch.lstm: Rule(lstm, is_last_word=True, is_placed=False),
    torch.gru: Rule(gru, is_last_word=True, is_placed=False),
    torch.rnn_tanh: Rule(rnn_tanh, is_last_word=True, is_placed=False),
    torch.rnn_relu: Rule(rnn_relu, is_last_word=True, is_placed=False),
    torch.lstm_cell: Rule(lstm_cell, is_last_word=True),
    torch.gru_cell: Rule(gru_cell, is_last_word=True),
    torch.rnn_tanh_cell: Rule(rnn_cell_tanh, is_last_word=True),
    torch.rnn_relu_cell: Rule(rnn_cell_relu, is_last_word=True),
}
for _axes, (_forward, _transposed) in enumerate(
    [
        (F.conv1d, F.conv_transpose1d),
        (F.conv2d, F.conv_transpose2d),
        (F.conv3d, F.conv_transpose3d),
    ],
    start=1,
):
    RULES[_forward] = Rule(partial(conv, _axes))
    RULES[_transposed] = Rule(partial(conv_transpose, _axes))
RULES |= dict.fromkeys([torch.add, Tensor.add, Tensor.add_], Rule(_add))
RULES |= dict.fromkeys([torch.sub, Tensor.sub, Tensor.sub_], Rule(_sub))
RULES |= dict.fromkeys([torch.mul, Tensor.mul, Tensor.mul_], Rule(_mul))
