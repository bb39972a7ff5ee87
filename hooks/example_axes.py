"""Example axes: which axis of what a probe holds, and of what a model returns, is the examples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sonde.exceptions import InvalidInputError


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
    """Tells which axis of a model's outputs holds the examples: `batch_dim` or the first.

    Where both have their number, what was seen of the same output before decides.

    Args:
        inputs: Where they are in the inputs.

    Example:
        >>> axes = OutputAxes(ExampleAxes(1))
        >>> axes.of("[logits]", [7, 5, 10], 5), axes.of("[label]", [5, 10], 5)
        (1, 0)
        >>> axes.of("[logits]", [7, 7, 10], 7)
        1
    """

    def __init__(self, inputs: ExampleAxes) -> None:
        self.inputs = inputs
        self._seen: dict[tuple[str, int], int] = {}

    def of(self, path: str, shape: Sequence[int], num_examples: int) -> int | None:
        """Return the axis of an output; None if none of the two has the number of examples.

        Args:
            path: The way to it, in what the model returns.
            shape: Its shape.
            num_examples: The number of examples.

        Raises:
            InvalidInputError: If both have, and nothing has told them apart.
        """
        dims = {0, self.inputs.batch_dim}
        found = [dim for dim in dims if dim < len(shape) and shape[dim] == num_examples]
        key = (path, len(shape))
        if not found:
            return None
        if len(found) == 1:
            self._seen[key] = found[0]
        elif key not in self._seen:
            if num_examples == 1:
                return 0  # Without an axis of size 1, whichever it is, the same remains.
            raise InvalidInputError(
                f"axes 0 and {self.inputs.batch_dim} of an output {list(shape)} have the size of "
                "the batch; give the probe another `batch_size`"
            )
        return self._seen[key]
