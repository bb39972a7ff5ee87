"""Saturated examples: those of which float32 loses the gradient that a loss sends back.

An example is saturated if its gradient with respect to the logits is so small that softmax −
one-hot, as a difference of numbers close to 1, has no digit of it in float32: half the sum of its
absolute entries is not zero, and below 2⁻²⁴, half the distance of 1 to the next float32. Of cross
entropy that is 1 − p of the true class, of the mean over tokens its mean over tokens, and of
sigmoid − target half its absolute value. The logits are the outputs of the model, or what its last
softmax, log-softmax, sigmoid or tanh was given. Zero gradients are not counted among them: they
are zero in any precision, or in float32 alone, where nothing tells one from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.axes import OutputAxes
from sonde.hooks.model.taps import tensor_leaves

from .float64_heads import Float64Heads

SATURATED = 2.0**-24

_HEADS = ("LogSoftmax", "Softmax", "Sigmoid", "LogSigmoidForward", "Tanh")
# What leaves or only reorders entries; and, of a model that returns its loss, reduces them.
_PASSING = (
    *("ToCopy", "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "Contiguous"),
    *("Squeeze", "Unsqueeze", "Transpose", "Permute", "T"),
)


class Logits:
    """Where the gradients with respect to a model's logits are found.

    Args:
        outputs: What the model returned.
        num_examples: The number of examples.
        output_axes: Tells where they are.
        heads: What saw the model make the outputs.

    Attributes:
        edges: The places in the graph.
    """

    def __init__(
        self,
        outputs: Any,
        num_examples: int,
        output_axes: OutputAxes,
        heads: Float64Heads | None = None,
    ) -> None:
        self._num_examples = num_examples
        self._axes = output_axes
        self._paths: list[str] = []
        self.edges: list[GradientEdge] = []
        found = tensor_leaves(outputs)
        # Beside these a model may return what they are made of, such as hidden states.
        found = [pair for pair in found if pair[0] == "[logits]"] or found
        for path, leaf in found:
            if leaf.requires_grad and leaf.ndim:
                self._paths.append(path)
                self.edges.append(edge_of(leaf if heads is None else heads.again(leaf)))

    def are_saturated(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Return which examples are saturated, [examples]; None if that is not known.

        Args:
            gradients: The gradients at the edges, of the examples' own losses.
        """
        total: Tensor | None = None
        for at, gradient in enumerate(gradients):
            if gradient is None:
                continue
            sums = self.half_sums(at, gradient)
            if sums is None:
                return None
            total = sums if total is None else total + sums
        return None if total is None else are_saturated(total)

    def half_sums(self, at: int, gradient: Tensor) -> Tensor | None:
        """Return half the sum of the absolute entries of each example, float32 at least.

        Args:
            at: Which of the edges it came through.
            gradient: The gradient.

        Returns:
            [examples]; None if it is not known where they are.
        """
        try:
            axis = self._axes.of(self._paths[at], gradient.shape, self._num_examples)
        except InvalidInputError:  # It may be one of several.
            return None
        if axis is None:
            return None
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        rows = gradient if axis == 0 else gradient.movedim(axis, 0)
        rows = rows if rows.ndim == 2 else rows.reshape(self._num_examples, -1)
        return rows.detach().abs().sum(1, dtype=dtype) / 2


def are_saturated(half_sums: Tensor) -> Tensor:
    """Return which examples are saturated, given half the sums of their absolute entries."""
    return (half_sums > 0) & (half_sums < SATURATED)


def edge_of(output: Tensor) -> GradientEdge:
    """Return where the gradient with respect to the logits of an output comes through."""
    node = output.grad_fn
    while node is not None:
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name in _HEADS:
            source, position = node.next_functions[0]
            return get_gradient_edge(output) if source is None else GradientEdge(source, position)
        node = node.next_functions[0][0] if name in _PASSING else None
    return get_gradient_edge(output)


def head_attributes(head: str, are_saturated: Tensor | None, norms: Tensor) -> dict[str, Any]:
    """Return what a record of gradients says of their head.

    Args:
        head: Its precision.
        are_saturated: Which examples are saturated, [examples]; None if that is not known.
        norms: The norm of each example's gradient, [examples].
    """
    about: dict[str, Any] = {"head": head, "num_zero_gradients": int((norms == 0).sum())}
    if are_saturated is not None:
        about["num_saturated"] = int(are_saturated.sum())
    return about
