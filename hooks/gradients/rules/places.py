"""Layouts: where the examples are in what an operation is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from sonde.hooks.gradients.factors.dense import Factor

Result = TypeVar("Result")

# Any instead of Tensor | None: a rule knows which of the gradients it needs are there.
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


class Place(Enum):
    """Where the examples are in an output."""

    FIRST = "the first axis"
    SECOND = "the second axis"
    OUTER = "the outer part of the first axis, [n · k, …]"
    INNER = "the inner part of the first axis, [k · n, …]"


# Sizes alone may not tell the place: which one goes first where the batch is first, where time is,
# and where rows are windows of examples or of steps.
ORDERS: tuple[tuple[Place, ...], ...] = (
    (Place.FIRST, Place.SECOND, Place.OUTER, Place.INNER),
    (Place.SECOND, Place.INNER, Place.FIRST, Place.OUTER),
    (Place.OUTER, Place.FIRST, Place.SECOND, Place.INNER),
    (Place.INNER, Place.FIRST, Place.SECOND, Place.OUTER),
)


@dataclass(frozen=True)
class Layout:
    """Where the examples are in an operation's output.

    Attributes:
        num_examples: Their number n.
        shape: The shape of the output.
        couplings: What makes gradients of an example depend on the others; rules add to it.
        unsorted: How to bring the examples of a packed sequence into their order.
        is_time_first: The examples are the second axis, or the inner one of [k · n, …].
        are_apart: The outputs have places of their own in the graph, so that the gradient with
            respect to one may have come through another.
        choice: Which of `ORDERS` decides where sizes do not tell.
    """

    num_examples: int
    shape: torch.Size
    couplings: list[str] = field(default_factory=list)
    unsorted: Tensor | None = None
    is_time_first: bool = False
    are_apart: bool = False
    choice: int = 0

    @cached_property
    def places(self) -> list[Place]:
        """The places the examples may be at. Of two axes the second holds features, never them."""
        n, shape = self.num_examples, self.shape
        if self.is_time_first:
            return [Place.SECOND if len(shape) > 2 else Place.INNER]
        places = []
        if shape and shape[0] == n:
            places.append(Place.FIRST)
        if len(shape) > 2 and shape[1] == n:
            places.append(Place.SECOND)
        if shape and shape[0] > n and shape[0] % n == 0:
            places += [Place.OUTER, Place.INNER]
        return places

    @cached_property
    def place(self) -> Place:
        """The place of the examples.

        Raises:
            UnsupportedError: If no axis has their number.
        """
        places = self.places
        if not places:
            shape = list(self.shape)
            raise UnsupportedError(
                f"no axis of its output {shape} is the batch of {self.num_examples}"
            )
        return min(places, key=ORDERS[self.choice].index)

    @property
    def axis(self) -> int:
        """The axis that holds the examples, or several rows of each, [n · k, …]."""
        return 1 if self.place is Place.SECOND else 0

    def by_example(self, values: Tensor) -> Tensor:
        """Return values as [n, k, …] with the k rows of each example; k is 1 of [n, …]."""
        if self.place is Place.SECOND:
            return values.transpose(0, 1)
        if self.place is Place.INNER:
            return cast(Tensor, values.unflatten(0, (-1, self.num_examples))).transpose(0, 1)
        return cast(Tensor, values.unflatten(0, (self.num_examples, -1)))

    def positions(self, values: Tensor) -> Tensor:
        """Return values as [n, t, features], at least float32."""
        values = widened(values)
        # To reshape twice takes as long as some layers do.
        is_in_order = values.ndim > 1 and self.place in (Place.FIRST, Place.OUTER)
        first = values if is_in_order else self.by_example(values)
        return first.reshape(self.num_examples, -1, first.shape[-1])

    def maps(self, values: Tensor) -> Tensor:
        """Return values [n · k, channels, …] as [n, k, channels, …], at least float32.

        Raises:
            UnsupportedError: If the examples are on another axis.
        """
        if self.place is Place.SECOND:
            raise UnsupportedError("the examples are on axis 1, which holds the channels")
        return self.by_example(widened(values))


def row_axis_of(layout: Layout, tensor: Tensor) -> int | None:
    """Return the axis of a tensor that is an axis of the output with a row for each example."""
    if layout.place not in (Place.FIRST, Place.SECOND) or isinstance(tensor, nn.Parameter):
        # A parameter itself may be as long as the batch by chance; it has no rows of examples.
        return None
    own = layout.axis - (len(layout.shape) - tensor.ndim)
    return own if own >= 0 and tensor.shape[own] == layout.num_examples > 1 else None


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
