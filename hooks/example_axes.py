"""Example axes: which axis of what a probe holds, and of what a model returns, is the examples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sonde.exceptions import InvalidInputError


class ExampleAxes:
    """Tells which axis of a tensor holds the examples.

    Args:
        batch_dim: The axis of inputs and targets, of those that have so many; the others hold the
            examples along the first. Outputs may do either, whatever they have.

    Example:
        >>> axes = ExampleAxes(1)
        >>> axes.of_output([7, 5, 10], 5), axes.of_output([5, 10], 5)
        (1, 0)
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self.batch_dim = batch_dim
        self._of_outputs: dict[int, int] = {}

    def of_input(self, tensor: Tensor) -> int:
        """Return the axis of a tensor of inputs or targets."""
        return self.batch_dim if tensor.ndim > self.batch_dim else 0

    def size_of(self, tensor: Tensor) -> int:
        """Return the number of examples of a tensor of inputs or targets; 0 of a scalar."""
        return tensor.shape[self.of_input(tensor)] if tensor.ndim else 0

    def rows_of(self, tensor: Tensor, rows: slice) -> Tensor:
        """Return some examples of a tensor of inputs or targets, in its memory."""
        return tensor[(slice(None),) * self.of_input(tensor) + (rows,)]

    def of_output(self, shape: Sequence[int], num_examples: int) -> int | None:
        """Return the axis of an output that has their number; None if none of the two has.

        Raises:
            InvalidInputError: If both have, and no output with as many axes has told them apart.
        """
        found = [
            axis
            for axis in {0, self.batch_dim}
            if axis < len(shape) and shape[axis] == num_examples
        ]
        if not found:
            return None
        if len(found) == 1:
            self._of_outputs[len(shape)] = found[0]
        elif len(shape) not in self._of_outputs:
            raise InvalidInputError(
                f"axes 0 and {self.batch_dim} of an output {list(shape)} have the size of the "
                "batch; give the probe another `batch_size`"
            )
        return self._of_outputs[len(shape)]
