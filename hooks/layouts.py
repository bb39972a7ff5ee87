"""Layouts: where the examples are in what an operation is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from .factors import Factor

Result = TypeVar("Result")

# An Any, as most rules know that there is one, and of which output.
Deltas: TypeAlias = Sequence[Any]
"""The gradients with respect to the outputs of an operation; None where none came back."""


_REASON_LENGTH = 160


class UnsupportedError(Exception):
    """Per-example gradients of a parameter cannot be given exactly; the text says why."""


@dataclass(frozen=True)
class Weight:
    """A parameter among the arguments of an operation.

    Attributes:
        tensor: The argument; it may be anything, and is looked up among the parameters.
        factor: Makes its per-example gradients of those with respect to the outputs.
        row_axis: The axis along which it has a row for each example, whose gradient is in its own
            row; None where it has none.
    """

    tensor: Any
    factor: Callable[[Deltas], Factor]
    row_axis: int | None = None


@dataclass(frozen=True)
class Layout:
    """Where the examples are in an operation's output.

    Attributes:
        num_examples: Their number n.
        shape: The shape of the output.
        couplings: What makes gradients of an example depend on the others; rules add to it.
        unsorted: How to bring the examples of a packed sequence into their order.
        is_time_first: The examples are the second axis, or the inner one of [t · n, …].
        are_apart: The outputs have places of their own in the graph, so that the gradient with
            respect to one may have come through another.
    """

    num_examples: int
    shape: torch.Size
    couplings: list[str] = field(default_factory=list)
    unsorted: Tensor | None = None
    is_time_first: bool = False
    are_apart: bool = False

    @property
    def axis(self) -> int | None:
        """The axis of the examples, 0 or 1; None if each has several rows, [n · k, …].

        Of two axes the second one holds features, even where there are as many.

        Raises:
            UnsupportedError: If no axis has their number.
        """
        n, shape = self.num_examples, self.shape
        if self.is_time_first:
            return 1 if len(shape) > 2 else None
        if shape and shape[0] == n:
            return 0
        if len(shape) > 2 and shape[1] == n:
            return 1
        if shape and shape[0] and shape[0] % n == 0:
            return None
        raise UnsupportedError(f"no axis of its output {list(shape)} is the batch of {n}")

    def batch_first(self, values: Tensor) -> Tensor:
        """Return values with the examples on axis 0."""
        if self.axis == 0:
            return values
        if self.axis == 1:
            return values.transpose(0, 1)
        if self.is_time_first:
            return cast(Tensor, values.unflatten(0, (-1, self.num_examples))).transpose(0, 1)
        return cast(Tensor, values.unflatten(0, (self.num_examples, -1)))

    def positions(self, values: Tensor) -> Tensor:
        """Return values as [n, t, features], at least float32."""
        first = self.batch_first(widened(values))
        return first.reshape(self.num_examples, -1, first.shape[-1])

    def maps(self, values: Tensor) -> Tensor:
        """Return values [n · k, channels, …] as [n, k, channels, …], at least float32.

        Raises:
            UnsupportedError: If axis 0 does not hold the examples.
        """
        n = self.num_examples
        if len(values) % n or self.is_time_first:
            raise UnsupportedError(f"axis 0 of {list(values.shape)} is not the batch of {n}")
        return cast(Tensor, widened(values).unflatten(0, (n, -1)))


def widened(values: Tensor) -> Tensor:
    """Bring half precision to float32, as inner products need it."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def reason_of(error: Exception) -> str:
    """Return what went wrong in one line; some errors of PyTorch have pages."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    text = text if len(text) <= _REASON_LENGTH else f"{text[:_REASON_LENGTH]}…"
    return f"{type(error).__name__}: {text}"


def remembered(function: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Let a function of output gradients run once for all parameters of an operation."""
    latest: list[Any] = []

    def call(deltas: Any) -> Result:
        if not latest or latest[0] is not deltas:
            latest[:] = [deltas, function(deltas)]
        return cast("Result", latest[1])

    return call
