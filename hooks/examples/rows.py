"""Example rows: whose rows an output has, where its first axis holds several of each example.

Window attention cuts every image into windows and takes them all for a batch, [n · k, …]; so do
layers that see the tokens or the heads of all examples. Sizes do not tell whether the k rows of an
example stand together or in turn with those of others. So a model is run on a few examples, and
again with each of them replaced by another: the rows that change belong to that example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sonde.hooks.model.taps import map_tensors, tensor_leaves

from .axes import Seen, batch_axis, why_no_axis

# How many examples are exchanged, in turn; and how many are looked at for one that is unlike
# another.
NUM_EXCHANGED = 3
NUM_COMPARED = 16
# A row has changed if it did by this part of what the most changed one did: rounding may differ.
_CHANGED = 1e-4


class RowOrder(Enum):
    """How the k rows of each of n examples stand in one axis."""

    TOGETHER = "[n · k, …]: all rows of an example, then those of the next one"
    IN_TURN = "[k · n, …]: a row of each example, then the next row of each"


@dataclass(frozen=True)
class OutputPlace:
    """Where the examples are in an output.

    Attributes:
        axis: The axis that holds them.
        num_rows: How many rows along it each example has.
        order: How they stand.

    Example:
        >>> rows = torch.arange(6.0)
        >>> OutputPlace(0, 2).features(rows, 3).tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        >>> OutputPlace(0, 2, RowOrder.IN_TURN).features(rows, 3).tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """

    axis: int
    num_rows: int | None = None
    order: RowOrder = RowOrder.TOGETHER

    def holds(self, shape: Sequence[int], num_examples: int) -> bool:
        """Tell whether an output of a shape has so many examples here."""
        size = num_examples * (self.num_rows or 1)
        return self.axis < len(shape) and shape[self.axis] == size

    def feature_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of the features of an example, of an output of a shape."""
        if self.num_rows is None:
            return [*shape[: self.axis], *shape[self.axis + 1 :]]
        return [self.num_rows * shape[1], *shape[2:]] if len(shape) > 1 else [self.num_rows]

    def features(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return the features of each example, [examples, …].

        The rows of an example follow each other along the next axis, with their channels, so that
        pooling takes the positions of each row, as it does of examples of one row.
        """
        if self.num_rows is None:
            return tensor.movedim(self.axis, 0)
        if self.order is RowOrder.TOGETHER:
            rows = tensor.unflatten(0, (num_examples, self.num_rows))
        else:
            rows = tensor.unflatten(0, (self.num_rows, num_examples)).transpose(0, 1)
        return torch.as_tensor(rows.flatten(1, 2) if rows.ndim > 2 else rows)


@dataclass(frozen=True)
class Unknown:
    """Why it is not known whose the rows of an output are.

    Attributes:
        reason: The reason.
        is_final: Another look shows no more.
    """

    reason: str
    is_final: bool = True


def place_of(
    shape: Sequence[int], size: int, seen: Sequence[Seen], rows: OutputPlace | Unknown | None
) -> OutputPlace | str:
    """Return where the examples are in an output, or why that is not known.

    Args:
        shape: Its shape for `size` examples.
        size: The number of examples.
        seen: Its shapes for other numbers of them.
        rows: What was found of its rows, if it has several of each example.
    """
    axis = batch_axis(shape, size, *seen)
    if axis is not None:
        return OutputPlace(axis)
    if isinstance(rows, Unknown):
        return (
            f"it cannot be told which rows of its output {list(shape)} belong to which of "
            f"{size} examples: {rows.reason}"
        )
    if rows is None:
        return why_no_axis(shape, size, *seen)
    if rows.holds(shape, size):
        return rows
    return (
        f"its output {list(shape)} does not have {rows.num_rows} rows for each of {size} "
        "examples, as it had for a few of them"
    )


def may_have_rows(shape: Sequence[int], num_examples: int) -> bool:
    """Tell whether the first axis of an output may hold several rows of each example."""
    return bool(shape) and shape[0] > num_examples and shape[0] % num_examples == 0


class FewExamples:
    """Some of the examples that a model is called with, of which others can take the places.

    Args:
        given: The arguments, however they are nested.
        axis_of: Returns the axis of a tensor that holds them; None if it holds none.
    """

    def __init__(self, given: Any, axis_of: Callable[[Tensor], int | None]) -> None:
        self._given = given
        self._axis_of = axis_of

    def first(self, number: int, exchanged: Mapping[int, int] | None = None) -> Any:
        """Return copies of the arguments with the first examples only.

        Args:
            number: How many.
            exchanged: The examples that are taken instead of some of them.
        """
        taken = [(exchanged or {}).get(example, example) for example in range(number)]

        def some(tensor: Tensor) -> Tensor:
            axis = self._axis_of(tensor)
            if axis is None:
                return tensor.detach().clone()
            return tensor.detach().index_select(axis, torch.tensor(taken, device=tensor.device))

        return map_tensors(self._given, some)

    def stand_in(self, example: int) -> int | None:
        """Return another example that differs from one; None if a few of them are no others."""
        leaves = [tensor.detach() for _, tensor in tensor_leaves(self._given)]
        held = [(t, axis) for t in leaves if (axis := self._axis_of(t)) is not None]
        return unlike(held, example) if held else None


def unlike(held: Sequence[tuple[Tensor, int]], example: int) -> int | None:
    """Return another example that differs from one; None if a few of them are no others.

    Args:
        held: Tensors, each with the axis that holds the examples.
        example: The example.
    """
    size = held[0][0].shape[held[0][1]]
    for other in reversed(range(max(0, size - NUM_COMPARED), size)):
        if not all(torch.equal(t.select(axis, example), t.select(axis, other)) for t, axis in held):
            return other
    return None


def changed_entries(base: Tensor, other: Tensor) -> Tensor:
    """Return which entries along the first two axes have changed, [rows, columns]."""
    difference = (base - other).abs().double().nan_to_num()
    if not difference.numel():
        return torch.zeros(*base.shape[:1], 1, dtype=torch.bool)
    rows = difference.reshape(*base.shape[:2], -1) if base.ndim > 1 else difference[:, None, None]
    largest = rows.amax(2)
    return largest > _CHANGED * largest.max()


def changed_examples(changed: Tensor, num_examples: int, order: RowOrder) -> set[int]:
    """Return the examples that rows belong to in an order, of those rows that have changed.

    Args:
        changed: Which rows have, [rows].
        num_examples: The number of examples.
        order: The order.
    """
    if order is RowOrder.TOGETHER:
        by_example = changed.unflatten(0, (num_examples, -1)).any(1)
    else:
        by_example = changed.unflatten(0, (-1, num_examples)).any(0)
    return set(by_example.nonzero().flatten().tolist())


def changed_rows(base: Tensor, other: Tensor | None) -> Tensor | None:
    """Return which rows have changed, [rows]; None if there is another number of them."""
    if other is None or other.shape != base.shape:
        return None
    return changed_entries(base, other).any(1)


def rows_in(
    base: Tensor, changed: Mapping[int, Tensor | None], num_examples: int
) -> OutputPlace | Unknown:
    """Return where the rows of examples are, from which of them change with an example.

    Args:
        base: The output for `num_examples` examples, [rows, …].
        changed: Which rows have changed when an example was exchanged, by its number.
        num_examples: The number of examples.
    """
    known = {example: rows for example, rows in changed.items() if rows is not None}
    if len(known) < len(changed):
        return Unknown("their number depends on the examples")
    if not all(rows.any() for rows in known.values()):
        if torch.equal(base, base[:1].expand_as(base)):
            # Of weights that are zero as yet.
            return Unknown("all of them are the same as yet", is_final=False)
        return Unknown("they do not change with each example")
    orders = [
        order
        for order in RowOrder
        if all(changed_examples(rows, num_examples, order) == {e} for e, rows in known.items())
    ]
    if len(orders) == 1:
        return OutputPlace(0, len(base) // num_examples, orders[0])
    if orders:
        return Unknown("too few of them change with the examples")
    if bool((torch.stack(list(known.values())).sum(0) > 1).any()):
        return Unknown("a row depends on several examples")
    return Unknown("they are in an order of their own")


def exchanges(few: FewExamples, num_examples: int) -> dict[int, int] | None:
    """Return the examples to exchange, each with the one that takes its place; None if alike."""
    found = {}
    for example in range(min(num_examples, NUM_EXCHANGED)):
        other = few.stand_in(example)
        if other is None:
            return None
        found[example] = other
    return found


def grows(shape: Sequence[int], number: int, other_shape: Sequence[int], other: int) -> bool:
    """Tell whether the first axis of an output, and no other, grows with the examples."""
    rest_is_same = list(shape[1:]) == list(other_shape[1:])
    return rest_is_same and shape[0] * other == other_shape[0] * number
