"""Rules for convolutions, and the sums over positions they share with normalizations.

Axes: n examples; k maps of an example; t positions; g groups; o outputs; i inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.factors.outer import Outer

from .places import Deltas, Layout, Weight

Size: TypeAlias = int | Sequence[int] | str


@dataclass(frozen=True)
class _Unfolding:
    """Makes the patches a convolution sees, [rows, g, t, i], of [rows, k, channels, *positions].

    Of a transposed one these are patches of its output, whose padding may leave room for more than
    the `num_positions` of its input along each axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    num_positions: tuple[int, ...] | None = None

    def __call__(self, source: Tensor) -> Tensor:
        maps = source.flatten(0, 1)
        is_pointwise = all(size == 1 for size in (*self.kernel, *self.stride))
        if is_pointwise and not any(self.padding) and self.num_positions is None:
            patches = maps.flatten(2)
        else:
            patches = self._patches(maps)
        # [rows · k, g · i, t] -> [rows, g, k · t, i]
        grouped = patches.unflatten(1, (self.groups, -1)).transpose(2, 3)
        return _merge(grouped, source.shape[1])

    def _patches(self, maps: Tensor) -> Tensor:
        num_axes = len(self.kernel)
        amounts = [amount for pad in reversed(self.padding) for amount in (pad, pad)]
        patches = F.pad(maps, amounts) if any(amounts) else maps
        for axis in range(num_axes):
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            patches = patches.unfold(2 + axis, span, self.stride[axis])
            patches = patches[..., :: self.dilation[axis]]
            if self.num_positions is not None:
                patches = patches.narrow(2 + axis, 0, self.num_positions[axis])
        # [n, channels, *positions, *kernel] -> [n, channels · kernel, positions]
        kernel_axes = range(2 + num_axes, 2 + 2 * num_axes)
        patches = patches.permute(0, 1, *kernel_axes, *range(2, 2 + num_axes))
        return patches.flatten(1, 1 + num_axes).flatten(2)

    def form(self, delta: Tensor, source: Tensor) -> Tensor | None:
        """Form gradients by one convolution over all examples, where that is faster: measured.

        Args:
            delta: Gradients with respect to the outputs, [n, 1, t, o].
            source: What the layer was given, [n, 1, channels, height, width].

        Returns:
            The gradients [n, 1, o, i], or None.
        """
        n, g, t, o = delta.shape
        channels = source.shape[2]
        is_plain = g == source.shape[1] == 1 and len(self.kernel) == 2 and set(self.stride) == {1}
        if (
            not is_plain
            or not 8 <= channels <= 64
            or o > 64
            or t < 64
            or delta.device.type != "cpu"
        ):
            return None
        maps = source.flatten(0, 2)[None]
        height = source.shape[3] + 2 * self.padding[0] - self.dilation[0] * (self.kernel[0] - 1)
        gradients = torch.ops.aten.convolution_backward(
            delta.transpose(2, 3).reshape(1, n * o, height, -1),
            maps,
            maps.new_empty(n * o, channels, *self.kernel),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            n,  # Each example is a group of channels.
            [False, True, False],
        )[1]
        return cast(Tensor, gradients.view(n, 1, o, -1))


def _by_group(maps: Tensor, groups: int) -> Tensor:
    """[n, k, g · o, *positions] -> [n, g, k · t, o]."""
    grouped = maps.flatten(0, 1).flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
    return _merge(grouped, maps.shape[1])


def _merge(values: Tensor, k: int) -> Tensor:
    """[rows · k, g, t, f] -> [rows, g, k · t, f]."""
    if k == 1:
        return values
    apart: Tensor = values.unflatten(0, (-1, k))
    return apart.transpose(1, 2).flatten(2, 3)


def conv(
    num_axes: int,
    layout: Layout,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> list[Weight]:
    """Return the parameters among the arguments of F.conv1d, F.conv2d or F.conv3d."""
    kernel = tuple(weight.shape[2:])
    dilations = _sizes(dilation, num_axes)
    maps = input.detach()
    if padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilations, kernel, strict=True)]
        amounts = [x for total in reversed(totals) for x in (total // 2, total - total // 2)]
        maps, padding = F.pad(maps, amounts), 0
    elif padding == "valid":
        padding = 0
    unfolding = _Unfolding(
        kernel, _sizes(stride, num_axes), _sizes(padding, num_axes), dilations, groups
    )
    num_inputs = math.prod(weight.shape[1:])

    def of_weight(deltas: Deltas) -> Factor:
        delta = layout.maps(deltas[0])
        factor = Outer(_by_group(delta, groups), layout.maps(maps), num_inputs, unfolding)
        factor.form_at_once = unfolding.form
        return factor.compact()

    return [Weight(weight, of_weight), Weight(bias, partial(channel_sums, layout))]


def conv_transpose(
    num_axes: int,
    layout: Layout,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> list[Weight]:
    """Return the parameters among the arguments of a transposed convolution."""
    # The gradient is that of the convolution from the outputs back to the inputs.
    unfolding = _Unfolding(
        tuple(weight.shape[2:]),
        _sizes(stride, num_axes),
        _sizes(padding, num_axes),
        _sizes(dilation, num_axes),
        groups,
        tuple(input.shape[2:]) if any(_sizes(output_padding, num_axes)) else None,
    )
    maps = input.detach()
    num_inputs = math.prod(weight.shape[1:])

    def of_weight(deltas: Deltas) -> Factor:
        positions = _by_group(layout.maps(maps), groups)
        return Outer(positions, layout.maps(deltas[0]), num_inputs, unfolding).compact()

    return [Weight(weight, of_weight), Weight(bias, partial(channel_sums, layout))]


def channel_sums(layout: Layout, deltas: Deltas) -> Factor:
    """Return the gradients of a bias: sums over all but examples and channels."""
    return Dense(over_channels(layout.maps(deltas[0])))


def over_channels(maps: Tensor) -> Tensor:
    """Sum [n, k, channels, *positions] over all but examples and channels."""
    return maps.flatten(3).sum((1, 3)) if maps.ndim > 3 else maps.sum(1)


def _sizes(value: Any, num_axes: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * num_axes if len(sizes) == 1 else sizes
