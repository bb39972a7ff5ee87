"""The loss of each example alone, from outputs of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.axes import ExampleAxes, OutputAxes
from sonde.hooks.model.taps import map_tensors, tensor_leaves, tensor_paths

from .class_losses import ClassLoss, are_classes, class_loss_of
from .default_loss import DefaultLoss
from .float64_heads import WIDE_BYTES, Float64Heads, is_narrow, is_wide
from .recomputed import recomputed

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""The loss of a batch: (outputs, targets) to a scalar, such as `F.cross_entropy`."""


def example_losses(
    loss: Loss,
    outputs: Any,
    targets: Tensor | None,
    num_examples: int,
    output_axes: OutputAxes | None = None,
    heads: Float64Heads | None = None,
) -> Tensor:
    """Return the loss of each example alone, [examples], float64 if the loss takes that.

    The loss sees batches of one example, so its reduction over a batch does not matter, and outputs
    and floating targets in float64. Cross entropy of many classes is computed in the outputs' type,
    to the same accuracy; for other losses of large outputs, of above `WIDE_BYTES` in float64, some
    examples are evaluated at a time, and once more in the backward pass.

    Args:
        loss: The loss of a batch.
        outputs: What the model returned.
        targets: One target per example.
        num_examples: The number of examples.
        output_axes: Tells where they are; by default along the first axis.
        heads: What saw the model make the outputs.

    Raises:
        InvalidInputError: If the loss is no scalar, or the outputs have no row per example.
    """
    heads = Float64Heads() if heads is None else heads
    where = output_axes or OutputAxes(ExampleAxes())
    if isinstance(loss, DefaultLoss):
        loss, outputs = loss.taken(outputs, num_examples)
    of_classes = class_loss_of(loss)
    if of_classes is not None and not where.inputs.batch_dim and are_classes(outputs, targets):
        if of_classes.reduction != "none" and len(outputs) == num_examples:
            assert targets is not None
            # The same at once: transforming it takes longer than a small model.
            return _class_losses(of_classes, outputs, targets, heads)
    found = tensor_leaves(outputs)
    leaves = [leaf for _, leaf in found]
    if not leaves:
        raise InvalidInputError("the model returned no tensor, so there is nothing to measure")
    # What has no row per example, such as the state of a recurrent layer, is given as it is.
    axes = [where.of(path, leaf.shape, num_examples) for path, leaf in found]
    if all(axis is None for axis in axes):
        shapes = [list(leaf.shape) for leaf in leaves]
        raise InvalidInputError(
            f"the model's outputs {shapes} have no row for each of the {num_examples} examples"
        )
    target_axis = 0 if targets is None else where.inputs.of(targets)
    rows = _Rows(loss, outputs, [heads.again(leaf) for leaf in leaves], axes, targets, target_axis)
    try:
        return rows.losses(num_examples, torch.float64)
    except InvalidInputError:
        raise
    except Exception as error:  # Such as of a loss that is compiled for float32.
        with told_of(loss, outputs):
            losses = rows.losses(num_examples, None)
        heads.refusal = str(error).strip().partition("\n")[0] or type(error).__name__
        return losses


@contextmanager
def told_of(loss: Loss, outputs: Any) -> Iterator[None]:
    """Say of a loss that fails on outputs that are no tensor what it was given.

    Raises:
        InvalidInputError: In place of what it raises.
    """
    try:
        yield
    except InvalidInputError:
        raise
    except Exception as error:
        if isinstance(outputs, Tensor):
            raise
        shapes = ", ".join(f"{path} {list(x.shape)}" for path, x in tensor_paths(outputs))
        name = getattr(loss, "__name__", type(loss).__name__)
        raise InvalidInputError(
            f"`loss` ({name}) failed on what the model returns, a {type(outputs).__name__} of "
            f"{shapes}: {type(error).__name__}: {error}. Give a function of all of that, such as "
            f"lambda outputs, targets: {name}(outputs['logits'], targets)"
        ) from error


def example_loss(loss: Loss, outputs: Any, targets: Tensor | None, heads: Float64Heads) -> Tensor:
    """Return the loss of a batch of one example, of outputs and targets in float64.

    Args:
        loss: The loss of a batch.
        outputs: What the model returned.
        targets: The target, in a batch of one.
        heads: What saw the model make the outputs; it may know that the loss refuses float64.
    """
    if heads.refusal is not None:
        with Float64Heads():
            return loss(outputs, targets)
    try:
        with Float64Heads(promotes=True):
            return loss(heads.widened(outputs), targets if targets is None else heads.wide(targets))
    except Exception as error:
        with Float64Heads():
            value = loss(outputs, targets)
        heads.refusal = str(error)
        return value


def _class_losses(loss: ClassLoss, outputs: Tensor, targets: Tensor, heads: Float64Heads) -> Tensor:
    """Return the losses of examples whose outputs are scores of classes."""
    logits = heads.again(outputs)
    logits = logits.double() if is_narrow(logits) and not is_wide(logits) else logits
    return loss.of_examples(logits, targets)


@dataclass
class _Rows:
    """A batch that a loss sees one example at a time.

    Attributes:
        loss: The loss.
        outputs: What the model returned.
        leaves: Its tensors.
        axes: Where the examples are in each of them; None where they are not.
        targets: One target per example.
        target_axis: Where they are in these.
    """

    loss: Loss
    outputs: Any
    leaves: list[Tensor]
    axes: list[int | None]
    targets: Tensor | None
    target_axis: int

    def losses(self, num_examples: int, dtype: torch.dtype | None) -> Tensor:
        """Return the loss of each example.

        Args:
            num_examples: Their number.
            dtype: What tensors of fewer digits are cast to.
        """
        fixed = [x for x, axis in zip(self.leaves, self.axes, strict=True) if axis is None]
        batched = [
            (x, axis) for x, axis in zip(self.leaves, self.axes, strict=True) if axis is not None
        ]
        if self.targets is not None:
            batched.append((self.targets, self.target_axis))
        in_dims = tuple(axis for _, axis in batched)

        def compute(*tensors: Tensor) -> Tensor:
            if dtype is not None:
                tensors = tuple(x.to(dtype) if is_narrow(x) else x for x in tensors)
            with Float64Heads(promotes=dtype is not None):
                return self._each(tensors[: len(fixed)], tensors[len(fixed) :], in_dims)

        num_bytes = 8 * sum(x.numel() for x, _ in batched if is_narrow(x))
        if dtype is None or num_bytes <= WIDE_BYTES:
            return compute(*fixed, *(tensor for tensor, _ in batched))
        size = max(1, WIDE_BYTES * num_examples // num_bytes)
        blocks = zip(*(x.split(size, axis) for x, axis in batched), strict=True)
        return torch.cat([recomputed(compute, [*fixed, *block]) for block in blocks])

    def _each(
        self, fixed: tuple[Tensor, ...], tensors: tuple[Tensor, ...], in_dims: tuple[int, ...]
    ) -> Tensor:
        alone = partial(self._alone, fixed)
        try:
            losses: Tensor = torch.vmap(alone, in_dims)(*tensors)
            return losses
        except InvalidInputError:
            raise
        except Exception:  # Whatever vmap cannot transform in a user's loss, a loop can evaluate.
            unbound = (tensor.unbind(axis) for tensor, axis in zip(tensors, in_dims, strict=True))
            return torch.stack([alone(*rows) for rows in zip(*unbound, strict=True)])

    def _alone(self, fixed: tuple[Tensor, ...], *rows: Tensor) -> Tensor:
        """Return the loss of one example, of what is its own in the outputs, and its target.

        Raises:
            InvalidInputError: If it is no scalar.
        """
        axes = [axis for axis in self.axes if axis is not None]
        if self.targets is not None:
            axes.append(self.target_axis)
        lifted = [row.unsqueeze(axis) for row, axis in zip(rows, axes, strict=True)]
        target = None if self.targets is None else lifted.pop()
        own, others = iter(lifted), iter(fixed)
        given = iter([next(others) if axis is None else next(own) for axis in self.axes])
        value = self.loss(map_tensors(self.outputs, lambda _: next(given)), target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(
                f"`loss` of one example gave {shape}; expected a scalar tensor, as "
                "F.cross_entropy(outputs, targets) gives"
            )
        return value.reshape(())
