"""What the graph of a loss shows of it: how much each position of the batch counts.

A mean over labelled tokens, pixels or class weights is no mean over examples: an example counts as
much as its positions do. The last operation of a loss tells this, if it is one of torch's own.

The formula: a batch's loss is Σ_i W_i L_i / W, with L_i the loss of example i alone, W_i the weight
of its positions and W that of all. So n times the gradient of the batch's loss, times W / (n W_i),
is the gradient of L_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .float64_heads import Float64Heads

_TARGETED = ("NllLossBackward0", "NllLoss2DBackward0")
_WEIGHED = ("BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0")
_PLAIN = ("MseLossBackward0", "SmoothL1LossBackward0", "HuberLossBackward0")
_MEAN, _SUM = 1, 2  # How torch numbers reductions.
# They neither mix values nor change them.
_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias Clone Permute ReshapeAlias Slice Squeeze ToCopy Transpose UnsafeView Unsqueeze View"
    ).split()
)
_POOLINGS = ("MeanBackward1", "SumBackward1")
# Their rows are those of the batch, where a parameter multiplies them.
_HEADS = ("AddmmBackward0", "MmBackward0", "ConvolutionBackward0")


@dataclass(frozen=True)
class ShownLoss:
    """A loss whose last operation is known.

    Attributes:
        node: That operation in the graph.
        is_mean: It takes the mean over positions, else the sum.
        weights: How much each position counts, in their order; None if all count the same.
        scale: What the result is multiplied with on the way to the loss.
        positions: The loss of each position, where it was made of these.
    """

    node: Any  # torch has no public type of the operations of a graph.
    is_mean: bool
    weights: Tensor | None
    scale: float
    positions: Tensor | None = None

    def shares(self, num_examples: int) -> Tensor | None:
        """Return what makes n times the gradient of the loss that of each example's own loss.

        Float64 [examples], zero for an example that does not count at all; None where positions
        cannot be divided among the examples. Those of one example come one after the other.
        """
        ones = torch.ones(num_examples, dtype=torch.float64)
        if not self.is_mean:
            return ones / num_examples
        if self.weights is None:
            return ones
        if self.weights.numel() % num_examples:
            return None
        of_each = self.weights.double().reshape(num_examples, -1).sum(1).cpu()
        shares = of_each.sum() / (num_examples * of_each)
        return torch.where(of_each == 0, 0, shares)

    def apply(self, shares: Tensor) -> None:
        """Let gradients that pass the operation be multiplied by the shares of their examples."""
        factors = shares[:1]
        if self.weights is not None and self.is_mean:
            by_position = shares.repeat_interleave(self.weights.numel() // len(shares))
            factors = by_position.reshape(self.weights.shape)
        if self.positions is not None:
            self.positions.register_hook(lambda gradient: gradient * factors.to(gradient))
            return

        def multiply(gradients: tuple[Tensor, ...], _: Any) -> tuple[Tensor, ...]:
            first, *others = gradients
            along = factors.to(first)
            is_of_classes = factors.numel() > 1 and first.ndim > 1
            return first * (along.unsqueeze(1) if is_of_classes else along), *others

        self.node.register_hook(multiply)

    def is_of_examples(self, reduction: str, divided_by: float) -> bool:
        """Return whether a training's loss is the mean, or the sum, of the examples' own losses."""
        if abs(self.scale * divided_by - 1) > 1e-6 or self.is_mean != (reduction == "mean"):
            return False
        return (self.weights is None or not self.is_mean) and _has_own_rows(self.node)


def shown_loss(loss: Tensor, heads: Float64Heads | None = None) -> ShownLoss | None:
    """Return what the graph of a loss shows; None where it is not known.

    Args:
        loss: The loss.
        heads: What saw it made, if anything did.
    """
    class_losses = {} if heads is None else heads.class_losses
    node: Any = loss.grad_fn
    scale = 1.0
    try:
        while node is not None:
            name = node.name()
            if node in class_losses:
                options, positions, targets = class_losses[node]
                if options.reduction == "none":
                    return None
                weights = options.weights(targets, positions)
                is_mean, is_even = options.reduction == "mean", bool((weights == 1).all())
                return ShownLoss(node, is_mean, None if is_even else weights, scale, positions)
            if name in _VIEWS:
                node = node.next_functions[0][0]
            elif name in ("DivBackward0", "MulBackward0") and _is_scaled(node):
                other = float(node._saved_other)
                scale *= other if name.startswith("Mul") else 1 / other
                node = node.next_functions[0][0]
            else:
                return _shown(node, name, scale)
    except (AttributeError, RuntimeError, TypeError):
        pass  # Its values are gone, or are others in another version of torch.
    return None


def _is_scaled(node: Any) -> bool:
    of, *others = node.next_functions
    is_constant = of[0] is not None and all(other is None for other, _ in others)
    return is_constant and node._saved_other is not None


def _shown(node: Any, name: str, scale: float) -> ShownLoss | None:
    if name not in (*_TARGETED, *_WEIGHED, *_PLAIN) or node._saved_reduction not in (_MEAN, _SUM):
        return None
    is_mean, weights = node._saved_reduction == _MEAN, None
    if name in _TARGETED:
        target, of_classes = node._saved_target, node._saved_weight
        # An index is saved without its sign.
        ignored = (node._saved_ignore_index + 2**63) % 2**64 - 2**63
        counts = target != ignored
        if of_classes is not None:
            weights = of_classes[target.where(counts, 0)] * counts
        elif not bool(counts.all()):
            weights = counts
    elif name in _WEIGHED and node._saved_weight is not None:
        return None
    return ShownLoss(node, is_mean, weights, scale)


def _has_own_rows(node: Any) -> bool:
    """Return whether rows of what a loss is given are rows of what a layer returned.

    Products of examples with each other, as in a contrastive loss, are none.
    """
    node = node.next_functions[0][0]
    while node is not None:
        name = node.name()
        if name == "LogSoftmaxBackward0":
            result = node._saved_result
            if (node._saved_dim + 2**63) % 2**64 - 2**63 not in (-1, 1, result.ndim - 1):
                return False
        elif name in _POOLINGS:
            if any((dim + 2**63) % 2**64 - 2**63 == 0 for dim in node._saved_dim):
                return False  # The first axis holds the examples.
        elif name in _HEADS:
            return any(_is_parameter(of) for of, _ in node.next_functions)
        elif name not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return False


def _is_parameter(node: Any) -> bool:
    while node is not None and node.name() in ("TBackward0", "ToCopyBackward0"):
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")
