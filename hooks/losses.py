"""The loss of each example alone, from outputs of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sonde.exceptions import InvalidInputError

from .example_axes import ExampleAxes, OutputAxes
from .taps import map_tensors, tensor_leaves

_IGNORED = -100  # The target that F.cross_entropy leaves out.

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""The loss of a batch: (outputs, targets) to a scalar, such as `F.cross_entropy`."""


def example_losses(
    loss: Loss,
    outputs: Any,
    targets: Tensor | None,
    num_examples: int,
    output_axes: OutputAxes | None = None,
) -> Tensor:
    """Return the loss of each example alone, [examples].

    The loss sees batches of one example, so its reduction over a batch does not matter.

    Args:
        loss: The loss of a batch.
        outputs: What the model returned.
        targets: One target per example.
        num_examples: The number of examples.
        output_axes: Tells where they are; by default along the first axis.

    Raises:
        InvalidInputError: If the loss is no scalar, or the outputs have no row per example.
    """
    if loss is F.cross_entropy and targets is not None and _is_classified(outputs, targets):
        # The same at once: transforming it takes longer than a small model. The mean over one
        # example that is ignored is 0 / 0, here too.
        apart = F.cross_entropy(outputs, targets, reduction="none")
        return apart / (targets != _IGNORED)
    found = tensor_leaves(outputs)
    leaves = [leaf for _, leaf in found]
    if not leaves:
        raise InvalidInputError("the model returned no tensor, so there is nothing to measure")
    # What has no row per example, such as the state of a recurrent layer, is given as it is.
    where = output_axes or OutputAxes(ExampleAxes())
    axes = [where.of(path, leaf.shape, num_examples) for path, leaf in found]
    if all(axis is None for axis in axes):
        shapes = [list(leaf.shape) for leaf in leaves]
        raise InvalidInputError(
            f"the model's outputs {shapes} have no row for each of the {num_examples} examples"
        )
    batched = [(x, axis) for x, axis in zip(leaves, axes, strict=True) if axis is not None]
    if targets is not None:
        batched.append((targets, where.inputs.of(targets)))

    def alone(*rows: Tensor) -> Tensor:
        lifted = [row.unsqueeze(axis) for row, (_, axis) in zip(rows, batched, strict=True)]
        target = None if targets is None else lifted.pop()
        own = iter(lifted)
        given = iter(
            [x if axis is None else next(own) for x, axis in zip(leaves, axes, strict=True)]
        )
        value = loss(map_tensors(outputs, lambda _: next(given)), target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(
                f"`loss` of one example gave {shape}; expected a scalar tensor, as "
                "F.cross_entropy(outputs, targets) gives"
            )
        return value.reshape(())

    try:
        losses: Tensor = torch.vmap(alone, tuple(axis for _, axis in batched))(
            *(tensor for tensor, _ in batched)
        )
        return losses
    except InvalidInputError:
        raise
    except Exception:  # Whatever vmap cannot transform in a user's loss, a loop can evaluate.
        of_each = zip(*(tensor.unbind(axis) for tensor, axis in batched), strict=True)
        return torch.stack([alone(*rows) for rows in of_each])


def _is_classified(outputs: Any, targets: Tensor) -> bool:
    """Return whether there is a row of scores, and a class, for each example."""
    if type(outputs) is not Tensor or outputs.ndim != 2 or targets.ndim != 1:
        return False
    return len(outputs) == len(targets) and not targets.is_floating_point()
