"""Rules: how a layer's calls give the per-example gradients of its parameters.

A rule takes a module and its calls, each the input and the gradient with respect to the output of
one batch, and returns a factor per parameter. Several calls of one module in a forward pass add up.
A rule holds for every module whose `forward` is that of its type, subclasses included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Dense, Factor, Outer, Rows


class UnsupportedError(Exception):
    """Per-example gradients of a parameter cannot be given exactly; the text says why."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its input, and the gradient with respect to its output.

    Both have the examples on axis 0.
    """

    inputs: Tensor
    delta: Tensor


Rule: TypeAlias = Callable[[Any, Sequence[Call]], dict[str, Factor]]


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule for a module, or None."""
    if "forward" in vars(module):
        return None  # Someone replaced it on this instance.
    forward = type(module).forward
    return next((rule for kind, rule in _RULES.items() if forward is kind.forward), None)


def _linear(module: nn.Linear, calls: Sequence[Call]) -> dict[str, Factor]:
    inputs = torch.cat([_positions(call.inputs) for call in calls], dim=1)
    delta = torch.cat([_positions(call.delta) for call in calls], dim=1)
    weight = Outer(delta[:, None], lambda rows: inputs[rows, None], module.in_features)
    return {"weight": weight, "bias": Dense(delta.sum(1))}


def _conv(module: nn.modules.conv._ConvNd, calls: Sequence[Call]) -> dict[str, Factor]:
    groups = module.groups
    # [n, channels, *positions] -> [n, g, t, o]
    delta = torch.cat(
        [call.delta.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3) for call in calls], dim=2
    )

    def inputs(rows: slice) -> Tensor:
        return torch.cat([_unfold(module, call.inputs[rows]) for call in calls], dim=2)

    num_inputs = module.in_channels // groups * math.prod(module.kernel_size)
    return {
        "weight": Outer(delta, inputs, num_inputs),
        "bias": Dense(delta.sum(2).flatten(1)),
    }


def _unfold(module: nn.modules.conv._ConvNd, inputs: Tensor) -> Tensor:
    """Return the patches a convolution sees, [n, g, positions, inputs · kernel]."""
    num_axes = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = _padding(module)
    patches = F.pad(inputs, padding, mode=mode) if any(padding) else inputs
    for axis in range(num_axes):
        kernel, dilation = module.kernel_size[axis], module.dilation[axis]
        span = dilation * (kernel - 1) + 1
        patches = patches.unfold(2 + axis, span, module.stride[axis])[..., ::dilation]
    # [n, channels, *positions, *kernel] -> [n, g, t, i]
    positions = tuple(range(2, 2 + num_axes))
    kernel_axes = tuple(range(2 + num_axes, 2 + 2 * num_axes))
    patches = patches.permute(0, *positions, 1, *kernel_axes).flatten(1, num_axes)
    grouped: Tensor = patches.unflatten(2, (module.groups, -1))
    return grouped.flatten(3).transpose(1, 2)


def _padding(module: nn.modules.conv._ConvNd) -> list[int]:
    """Return the padding in the order of F.pad: last axis first, (before, after) each."""
    amounts: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            amounts += [total // 2, total - total // 2]
        elif module.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [cast(int, module.padding[axis])] * 2
    return amounts


def _embedding(module: nn.Embedding, calls: Sequence[Call]) -> dict[str, Factor]:
    if module.scale_grad_by_freq:
        raise UnsupportedError("scale_grad_by_freq makes a gradient depend on the other examples")
    rows = torch.cat([call.inputs.reshape(len(call.inputs), -1) for call in calls], dim=1)
    values = torch.cat([_positions(call.delta) for call in calls], dim=1)
    if module.padding_idx is not None:
        rows = torch.where(rows == module.padding_idx, -1, rows)
    return {"weight": Rows(rows, values, module.num_embeddings)}


def _layer_norm(module: nn.LayerNorm, calls: Sequence[Call]) -> dict[str, Factor]:
    shape = list(module.normalized_shape)
    normalized = [F.layer_norm(call.inputs, shape, eps=module.eps) for call in calls]
    return _scale_over_last(calls, normalized, len(shape))


def _rms_norm(module: nn.RMSNorm, calls: Sequence[Call]) -> dict[str, Factor]:
    shape = list(module.normalized_shape)
    normalized = [F.rms_norm(call.inputs, shape, eps=module.eps) for call in calls]
    return {"weight": _scale_over_last(calls, normalized, len(shape))["weight"]}


def _group_norm(module: nn.GroupNorm, calls: Sequence[Call]) -> dict[str, Factor]:
    normalized = [F.group_norm(call.inputs, module.num_groups, eps=module.eps) for call in calls]
    return _scale_over_channels(calls, normalized)


def _batch_norm(module: nn.BatchNorm2d, calls: Sequence[Call]) -> dict[str, Factor]:
    mean, variance = module.running_mean, module.running_var
    if module.training or mean is None or variance is None:
        raise UnsupportedError("batch statistics make a gradient depend on the other examples")
    normalized = [
        F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), eps=module.eps)
        for x in (call.inputs for call in calls)
    ]
    return _scale_over_channels(calls, normalized)


def _instance_norm(module: nn.InstanceNorm2d, calls: Sequence[Call]) -> dict[str, Factor]:
    use_statistics = module.training or not module.track_running_stats
    normalized = [
        F.instance_norm(
            call.inputs,
            module.running_mean,
            module.running_var,
            use_input_stats=use_statistics,
            momentum=0.0,
            eps=module.eps,
        )
        for call in calls
    ]
    return _scale_over_channels(calls, normalized)


def _scale_over_last(
    calls: Sequence[Call], normalized: Sequence[Tensor], num_axes: int
) -> dict[str, Factor]:
    """Sum over all axes but the examples and the last `num_axes`."""

    def summed(values: Tensor) -> Tensor:
        return _positions(values.flatten(-num_axes)).sum(1)

    weight = sum(summed(call.delta * x) for call, x in zip(calls, normalized, strict=True))
    bias = sum(summed(call.delta) for call in calls)
    return {"weight": Dense(cast(Tensor, weight)), "bias": Dense(cast(Tensor, bias))}


def _scale_over_channels(calls: Sequence[Call], normalized: Sequence[Tensor]) -> dict[str, Factor]:
    """Sum over all axes but the examples and the channels."""

    def summed(values: Tensor) -> Tensor:
        return values.flatten(2).sum(2) if values.ndim > 2 else values

    weight = sum(summed(call.delta * x) for call, x in zip(calls, normalized, strict=True))
    bias = sum(summed(call.delta) for call in calls)
    return {"weight": Dense(cast(Tensor, weight)), "bias": Dense(cast(Tensor, bias))}


def _positions(values: Tensor) -> Tensor:
    """Flatten the axes between examples and features: [n, …, features] -> [n, t, features]."""
    return values.reshape(len(values), -1, values.shape[-1])


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.InstanceNorm1d: _instance_norm,
}
