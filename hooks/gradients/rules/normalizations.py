"""Rules for normalizations: a scale's gradient is a sum of products with the normalized input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sonde.hooks.gradients.factors.dense import Dense, Factor

from .convolutions import channel_sums, over_channels
from .places import Deltas, Layout, Weight, widened


def layer_norm(
    layout: Layout,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> list[Weight]:
    """Return the parameters among the arguments of F.layer_norm."""

    def normalized() -> Tensor:
        x = widened(input.detach())
        # With a weight it takes half the time that it takes without: measured.
        one, zero = x.new_ones(normalized_shape), x.new_zeros(normalized_shape)
        return F.layer_norm(x, normalized_shape, one, zero, eps)

    return _scale_over_last(layout, len(normalized_shape), normalized, weight, bias)


def rms_norm(
    layout: Layout,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> list[Weight]:
    """Return the parameters among the arguments of F.rms_norm."""

    def normalized() -> Tensor:
        # The default of `eps` is that of the input's type.
        x = input.detach() if eps is None else widened(input.detach())
        return F.rms_norm(x, normalized_shape, eps=eps)

    return _scale_over_last(layout, len(normalized_shape), normalized, weight, None)


def _scale_over_last(
    layout: Layout, num_axes: int, normalized: Callable[[], Tensor], weight: Any, bias: Any
) -> list[Weight]:
    def summed(values: Tensor) -> Factor:
        return Dense(layout.positions(values.flatten(-num_axes)).sum(1))

    return [
        Weight(weight, lambda deltas: summed(times(normalized(), deltas[0]))),
        Weight(bias, lambda deltas: summed(deltas[0])),
    ]


def group_norm(
    layout: Layout,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> list[Weight]:
    """Return the parameters among the arguments of F.group_norm."""

    def normalized() -> Tensor:
        return F.group_norm(widened(input.detach()), num_groups, eps=eps)

    return _scale_over_channels(layout, normalized, weight, bias)


def batch_norm(
    layout: Layout,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Weight]:
    """Return the parameters among the arguments of F.batch_norm."""
    if training:
        layout.couplings.append("batch statistics")

    def normalized() -> Tensor:
        x = widened(input.detach())
        if training or running_mean is None or running_var is None:
            return F.batch_norm(x, None, None, training=True, eps=eps)
        return F.batch_norm(x, running_mean.to(x.dtype), running_var.to(x.dtype), eps=eps)

    return _scale_over_channels(layout, normalized, weight, bias)


def instance_norm(
    layout: Layout,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Weight]:
    """Return the parameters among the arguments of F.instance_norm."""
    if use_input_stats:  # Each channel is a group.
        return group_norm(layout, input, input.shape[1], weight, bias, eps)
    return batch_norm(layout, input, running_mean, running_var, weight, bias, False, momentum, eps)


def _scale_over_channels(
    layout: Layout, normalized: Callable[[], Tensor], weight: Any, bias: Any
) -> list[Weight]:
    def of_weight(deltas: Deltas) -> Factor:
        return Dense(over_channels(layout.maps(times(normalized(), deltas[0]))))

    return [Weight(weight, of_weight), Weight(bias, partial(channel_sums, layout))]


def times(own: Tensor, delta: Tensor) -> Tensor:
    """Return a product, at least float32, in the memory of a tensor that nothing else needs."""
    own, delta = widened(own), widened(delta)
    return own.mul_(delta) if own.dtype == delta.dtype else own * delta
