"""Accumulators: what takes the features of one layer, batch by batch, for a store.

What is taken is reduced or copied at once, because the next operation of the model may change the
tensor in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sonde.log import LogArray

from .host_copies import start_copy
from .log_arrays import to_log_array
from .references import Reference, gram_offsets
from .self_products import self_product

# Of a copy in a room, in bytes: a line of the cache.
_ALIGNMENT = 64


class Room:
    """One block of memory for the features that a pass holds.

    Copies of many sizes, made and freed in turn, would leave gaps that nothing fits into.

    Args:
        device: Where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear(0)

    def clear(self, num_bytes: int) -> None:
        """Make room for the copies of another pass; those of the last one are gone.

        Args:
            num_bytes: How much; what does not fit gets memory of its own.
        """
        # The old block goes before the new one comes.
        self._bytes = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._next = 0

    def copy(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor, in another type."""
        start = -(-self._next // _ALIGNMENT) * _ALIGNMENT
        end = start + values.numel() * dtype.itemsize
        if end > len(self._bytes):
            return values.to(dtype, copy=True)
        self._next = end
        return self._bytes[start:end].view(dtype).view(values.shape).copy_(values)


@dataclass(frozen=True)
class Part:
    """What a store keeps of some examples of a layer.

    Attributes:
        values: What it records of them.
        features: Their features, where other parts need them; [batch, features].
        reference: What was subtracted from the features.
        offsets: What that takes from inner products; float64 [batch].
    """

    values: Tensor
    features: Tensor | None = None
    reference: Reference | None = None
    offsets: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory its features take."""
        return 0 if self.features is None else self.features.nbytes


Join: TypeAlias = Callable[[Sequence[Part], str], list[LogArray]]
"""Makes what is recorded of a layer from all its parts, in the order of the examples."""


class Accumulator(ABC):
    """Takes the features of one layer, batch by batch, in the order of the examples."""

    def start(self, first: int) -> None:  # noqa: B027 - most hold nothing between batches
        """Begin another pass, whose next batch starts at this example."""

    @abstractmethod
    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        """Take the features of the next examples, [batch, …].

        Args:
            features: The features.
            is_held: Hold what later batches of this pass need of them. Where a pass holds only some
                batches, another one has to hold the others.
        """

    @abstractmethod
    def arrays(self, layer: str) -> list[LogArray]:
        """Return what is recorded of the layer."""


class GramAccumulator(Accumulator):
    """Multiplies the features of each batch with those of all earlier ones, which it holds.

    Args:
        dtype: The type in which features are multiplied.
        num_examples: The number of examples of a pass.
        device: Where they are.
        room: Where to hold features.
    """

    def __init__(
        self, dtype: torch.dtype, num_examples: int, device: torch.device, room: Room | None
    ) -> None:
        self._dtype = dtype
        self._num_examples = num_examples
        self._room = room or Room(device)
        self._gram = torch.zeros(num_examples, num_examples, dtype=dtype, device=device)
        self._reference: Reference | None = None
        self._offsets = torch.zeros(num_examples, dtype=torch.float64, device=device)
        self._held: list[tuple[slice, Tensor]] = []
        self._next = 0

    def start(self, first: int) -> None:
        """Begin another pass, whose next batch starts at this example."""
        self._held = []
        self._next = first

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        """Take the features of the next examples, [batch, …]."""
        batch = as_matrix(features)
        rows = slice(self._next, self._next + len(batch))
        self._next = rows.stop
        is_last = rows.stop == self._num_examples
        products: Tensor | None = None
        if self._reference is None:  # The same for all batches, in all passes.
            # Where one batch is all, its products are right already unless it is far from zero.
            products = self_product(batch.to(self._dtype)) if is_held and is_last else None
            self._reference = Reference.of(batch, self._dtype, products)
        if products is not None and self._reference.is_zero:
            self._gram[rows, rows] = products
        # Later batches need these features again, and the model may overwrite them.
        elif is_held and not is_last:
            copy = self._reference.subtract_from(self._room.copy(batch, self._dtype))
            self._multiply(rows, slice(None), copy, is_held)
            self._held.append((rows, copy))
        else:
            for columns, piece in self._reference.pieces(batch):
                self._multiply(rows, columns, piece, is_held)
        for others, _ in self._held:
            if others != rows:
                self._gram[others, rows] = self._gram[rows, others].T
        if is_last:
            self._held = []

    def _multiply(self, rows: slice, columns: slice, relative: Tensor, is_held: bool) -> None:
        """Add the products of some columns of features to those of the columns before."""
        assert self._reference is not None  # It is chosen first.
        for others, held in self._held:
            self._gram[rows, others].addmm_(relative, held[:, columns].T)
        if is_held:
            self._gram[rows, rows] += self_product(relative)
            if not self._reference.is_zero:
                self._offsets[rows] += self._reference.offsets(relative, columns)

    def arrays(self, layer: str) -> list[LogArray]:
        """Return what is recorded of the layer."""
        gram = to_log_array(self._gram, "gram", ("example", "other_example"), layer)
        return [gram, *gram_offsets([self._reference], self._offsets, layer)]


class PartAccumulator(Accumulator):
    """Takes parts that only have to be put one behind the other.

    Args:
        reduce: Makes what is kept of a batch.
        join: Puts the parts of a layer together.
    """

    def __init__(self, reduce: Callable[[Tensor], Part], join: Join) -> None:
        self._reduce = reduce
        self._join = join
        self._parts: list[Part] = []

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        """Take the features of the next examples, [batch, …]."""
        self._parts.append(self._reduce(features))

    def arrays(self, layer: str) -> list[LogArray]:
        """Return what is recorded of the layer."""
        return self._join(self._parts, layer)


class RowsAccumulator(Accumulator):
    """Takes rows of examples into one tensor, which is there before the model runs.

    Many small ones, made in between, would keep the memory of large ones from being given back.

    Args:
        reduce: Makes the rows of a batch, alike those of the first part.
        rows: The tensor, [examples, …].
        join: Makes what is recorded of it.
    """

    def __init__(
        self, reduce: Callable[[Tensor, Part | None], Part], rows: Tensor, join: Join
    ) -> None:
        self._reduce = reduce
        self._join = join
        self._rows = rows
        self._first: Part | None = None
        self._next = 0

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        """Take the features of the next examples, [batch, …]."""
        part = self._reduce(features, self._first)
        if self._first is None:
            self._first = Part(self._rows, reference=part.reference)
        start_copy(self._rows[self._next : self._next + len(part.values)], part.values)
        self._next += len(part.values)

    def arrays(self, layer: str) -> list[LogArray]:
        """Return what is recorded of the layer."""
        return self._join([self._first or Part(self._rows)], layer)


def as_matrix(features: Tensor) -> Tensor:
    """Return features [batch, …] as a matrix [batch, features], in their own memory."""
    values = features.detach()
    return values.flatten(1) if values.ndim > 1 else values[:, None]
