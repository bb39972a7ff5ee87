"""Losses that couple the examples: contrastive, ranked or centred ones.

Such a loss is no mean of losses of single examples, whatever they weigh. That shows at the outputs:
an example's row of the gradient of the batch's loss is then no multiple of the gradient of the loss
of that example alone, or has no gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sonde.hooks.examples.axes import OutputAxes
from sonde.hooks.model.own_warnings import without_warnings
from sonde.hooks.model.taps import tensor_leaves

from .class_losses import class_loss_of
from .float64_heads import Float64Heads
from .per_example import Loss, example_loss

COUPLED = "the loss couples the examples"
# How far a row may be off a multiple, relative to its norm, where float32 computed a loss; and how
# small one may be, relative to the largest, not to be rounding.
_TOLERANCE = 1e-2
_SMALLEST = 1e-5


def couples(
    loss: Loss,
    outputs: Any,
    targets: Tensor | None,
    losses: Tensor,
    axes: OutputAxes,
    heads: Float64Heads,
) -> bool:
    """Return whether a loss of a batch is seen to couple its examples.

    Args:
        loss: The loss.
        outputs: What the model returned.
        targets: One target per example.
        losses: The loss of each example alone, with its graph, [examples].
        axes: Tells where the examples are in the outputs.
        heads: What saw the model make the outputs.
    """
    if len(losses) < 2 or class_loss_of(loss) is not None:
        return False
    found = [
        (leaf, axis)
        for path, leaf in tensor_leaves(outputs)
        if (axis := axes.of(path, leaf.shape, len(losses))) is not None and leaf.requires_grad
    ]
    if not found:
        return False

    def of_batch() -> Tensor | None:
        try:
            with without_warnings():
                value = example_loss(loss, outputs, targets, heads)
                return _rows(value, found) if value.numel() == 1 else None
        except Exception:  # It may take one example only; then nothing is seen.
            return None

    whole = of_batch()
    if whole is None:
        return False
    own = _rows(losses.sum(), found).nan_to_num(posinf=0, neginf=0)
    norms = whole.norm(dim=1)
    along = ((own * whole).sum(1) / (own * own).sum(1).clamp_min(1e-300)).clamp_min(0)
    apart = (whole - along[:, None] * own).norm(dim=1) > _TOLERANCE * norms
    is_seen = bool(
        (apart & norms.isfinite() & (norms > _SMALLEST * norms.nan_to_num().max())).any()
    )
    # A loss that draws random numbers differs from itself.
    again = of_batch() if is_seen else None
    return again is not None and bool(torch.allclose(again, whole, rtol=1e-4, equal_nan=True))


def _rows(value: Tensor, found: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Return the gradients of the outputs, float64 [examples, values]."""
    leaves = [leaf for leaf, _ in found]
    if not value.requires_grad:
        gradients: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    else:
        gradients = torch.autograd.grad(
            value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    rows = [
        gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1).double()
        for gradient, (_, axis) in zip(gradients, found, strict=True)
    ]
    return torch.cat(rows, 1)
