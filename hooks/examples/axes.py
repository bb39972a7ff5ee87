"""Example axes: which axis of what a probe holds, and of what a model returns, is the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from sonde.exceptions import InvalidInputError

Seen: TypeAlias = tuple[int, Sequence[int]]
"""The shape of an output for some number of examples: (number, shape)."""


class ExampleAxes:
    """Tells which axis of inputs and targets holds the examples.

    Args:
        batch_dim: The axis, of tensors that have so many; the others hold examples along the first.
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self.batch_dim = batch_dim

    def of(self, tensor: Tensor) -> int:
        """Return the axis of a tensor."""
        return self.batch_dim if tensor.ndim > self.batch_dim else 0

    def size_of(self, tensor: Tensor) -> int:
        """Return the number of examples of a tensor; 0 of a scalar."""
        return tensor.shape[self.of(tensor)] if tensor.ndim else 0

    def rows_of(self, tensor: Tensor, rows: slice) -> Tensor:
        """Return some examples of a tensor, in its memory."""
        return tensor[(slice(None),) * self.of(tensor) + (rows,)]


class OutputAxes:
    """Tells which axis of a model's outputs holds the examples.

    One tensor, with the examples along its first axis alone, needs no look. Otherwise shapes for
    other numbers of examples tell; where there are none, it is `batch_dim` or the first axis.

    Args:
        inputs: Where they are in the inputs.
        seen: Returns the shapes of an output for other numbers of examples, by the path to it; it
            may run the model, and return nothing where that fails.

    Example:
        >>> axes = OutputAxes(ExampleAxes(1))
        >>> axes.of("[logits]", [7, 5, 10], 5), axes.of("[label]", [5, 10], 5)
        (1, 0)
        >>> axes.of("[logits]", [7, 7, 10], 7)
        1
    """

    def __init__(
        self, inputs: ExampleAxes, seen: Callable[[str], Sequence[Seen]] | None = None
    ) -> None:
        self.inputs = inputs
        self._seen = seen
        self._known: dict[tuple[str, int], int] = {}

    def of(self, path: str, shape: Sequence[int], num_examples: int) -> int | None:
        """Return the axis of an output; None if it has none.

        Args:
            path: The way to it, in what the model returns; empty if it is all.
            shape: Its shape.
            num_examples: The number of examples.

        Raises:
            InvalidInputError: If several axes have their number, and nothing tells them apart.
        """
        found = [axis for axis, size in enumerate(shape) if size == num_examples]
        if not found:
            return None
        key = (path, len(shape))
        if not path and not self.inputs.batch_dim and found == [0]:
            return self._known.setdefault(key, 0)
        if (known := self._known.get(key)) in found:
            return known
        seen = [] if self._seen is None else self._seen(path)
        if seen:
            axis = batch_axis(shape, num_examples, *seen)
        else:
            found = [axis for axis in found if axis in (0, self.inputs.batch_dim)]
            axis = found[0] if len(found) == 1 or (found and num_examples == 1) else None
        if axis is not None and num_examples > 1:
            self._known[key] = axis
        if axis is None and len(found) > 1 and all(number == num_examples for number, _ in seen):
            raise InvalidInputError(
                f"axes {' and '.join(map(str, found))} of an output {list(shape)} have the size of "
                "the batch; give the probe another `batch_size`"
            )
        return axis


def batch_axis(shape: Sequence[int], size: int, *seen: Seen) -> int | None:
    """Return the axis that holds the examples: that which has their number however many they are.

    Args:
        shape: The shape of an output for `size` examples.
        size: The number of examples.
        seen: Its shapes for other numbers of them. Without any, only axis 0 can be the one.

    Returns:
        The axis, the first one if several grow with the examples. None if there is none, or where
        several have their number, and no other number has told them apart.

    Example:
        >>> batch_axis([7, 7, 32], 7, (2, [7, 2, 32]))
        1
        >>> batch_axis([2, 5, 2, 8], 2), batch_axis([2, 5, 2, 8], 2, (3, [2, 5, 3, 8]))
        (0, 2)
    """
    if not seen:
        return 0 if shape and shape[0] == size else None
    pairs = [(size, shape), *seen]
    if any(len(other) != len(shape) for _, other in seen):
        return None
    axes = range(len(shape))
    found = [axis for axis in axes if all(other[axis] == number for number, other in pairs)]
    if size > 1 < len(found) and all(number == size for number, _ in seen):
        return None  # Any of them may be the one.
    return found[0] if found else None


def why_no_axis(shape: Sequence[int], size: int, *seen: Seen) -> str:
    """Return why no axis of an output is taken for the examples.

    Args:
        shape: The shape of an output for `size` examples.
        size: The number of examples.
        seen: Its shapes for other numbers of them.
    """
    if size in shape and all(number == size for number, _ in seen):
        return f"it cannot be told whether an axis of its output {list(shape)} holds the examples"
    return f"no axis of its output {list(shape)} is the batch of {size}"


def is_ambiguous(shape: Sequence[int], size: int) -> bool:
    """Return whether several axes have the number of examples."""
    return list(shape).count(size) > 1
