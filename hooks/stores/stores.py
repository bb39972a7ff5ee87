"""Stores: the form kept of each layer's examples × features matrix.

A store makes an accumulator per layer and pass; it takes the features of one batch at a time and
returns the array to record. What it takes is reduced or copied at once, because the next operation
of the model may change the tensor in place.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sonde.exceptions import InvalidInputError
from sonde.hooks.arguments import check_dtype, check_whole
from sonde.log import LogArray

from .accumulators import (
    Accumulator,
    GramAccumulator,
    Part,
    PartAccumulator,
    Room,
    RowsAccumulator,
    as_matrix,
)
from .host_copies import empty_on_host, start_copy, wait_for_copies
from .log_arrays import to_log_array
from .parts import offset_arrays, part_of_blocks, reference_for, relative_to
from .projections import projected
from .references import SKETCH_REFERENCE, Reference
from .self_products import self_product


class Store(ABC):
    """A form in which features can be kept."""

    @abstractmethod
    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator for one layer and one pass over `num_examples` examples.

        Args:
            num_examples: Their number.
            none: The features of no example, [0, …].
            room: Where to hold features for later batches.
        """

    def held_bytes(self, num_features: int, dtype: torch.dtype) -> int:
        """Return how many bytes of an example are held while later batches come."""
        return 0

    def block_sizes(self, batch_sizes: Sequence[int]) -> list[int] | None:
        """Return the number of examples of each block that is kept of batches; None if all is."""
        return None

    @abstractmethod
    def kept_bytes(self, num_examples: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes are kept of a layer whose features of an example have a shape."""

    @abstractmethod
    def part(self, features: Tensor, *, is_held: bool, first: Part | None = None) -> Part:
        """Reduce the features of some examples, [batch, …], to what is kept of them.

        Args:
            features: The features.
            is_held: Keep what joining them with other parts takes.
            first: The first part that these will be joined with, if there was one.
        """

    @abstractmethod
    def join(self, parts: Sequence[Part], layer: str) -> list[LogArray]:
        """Return what is recorded of a layer, from all its parts in the order of the examples.

        Raises:
            InvalidInputError: If they cannot be joined.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""


@dataclass(frozen=True)
class Gram(Store):
    """Keep the examples × examples matrix of inner products, exact.

    It is enough for CKA, principal components over examples and stiffness, and it does not grow
    with the width of the layer. Half-precision features are multiplied in float32. Where features
    lie far from zero, so that this would lose what differs between examples, a reference is
    subtracted first; the record says so, and readers return the inner products of the features.

    Args:
        dtype: float32 or float64; by default float64 for float64 features, else float32.
        block: Keep only the products of examples of the same block of this many; the model is run
            on a block at a time. It is what minibatch CKA needs (Nguyen et al., 2021, 2010.15327,
            section 3), grows linearly with the number of examples, and holds no features.

    Raises:
        InvalidInputError: If the dtype is another one, or a block has fewer than 4 examples.
    """

    dtype: torch.dtype | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            check_whole("block", self.block, 4, note=", because centring needs 4 examples")
        check_dtype(self.dtype)
        if self.dtype not in (None, torch.float32, torch.float64):
            raise InvalidInputError(
                f"`dtype` (={self.dtype}) of a Gram matrix must be torch.float32 or "
                "torch.float64, because centring cancels most digits of a lower precision"
            )

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator; with one batch it holds no features at all."""
        if self.block is not None:
            return PartAccumulator(partial(self.part, is_held=False), self.join)
        return GramAccumulator(self.dtype_for(none.dtype), num_examples, none.device, room)

    def held_bytes(self, num_features: int, dtype: torch.dtype) -> int:
        """Return how many bytes of an example are held while later batches come."""
        return num_features * self.dtype_for(dtype).itemsize if self.block is None else 0

    def block_sizes(self, batch_sizes: Sequence[int]) -> list[int] | None:
        """Return the number of examples of each block that is kept of batches; None if all is."""
        if self.block is None:
            return None
        return [
            min(self.block, size - start)
            for size in batch_sizes
            for start in range(0, size, self.block)
        ]

    def kept_bytes(self, num_examples: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes are kept of a layer, whatever the shape of its features."""
        batches = [num_examples]
        num_values = sum(size**2 for size in self.block_sizes(batches) or batches)
        return num_values * self.dtype_for(dtype).itemsize

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which features of a type are multiplied."""
        return self.dtype or (torch.float64 if dtype == torch.float64 else torch.float32)

    def held(self, features: Tensor) -> Tensor:
        """Return a copy of features in the type in which they are multiplied, [batch, features]."""
        batch = as_matrix(features)
        return batch.to(self.dtype_for(batch.dtype), copy=True)

    def part(self, features: Tensor, *, is_held: bool, first: Part | None = None) -> Part:
        """Return the matrix of some examples, and a copy of their features where that is held."""
        batch = as_matrix(features)
        dtype = self.dtype_for(batch.dtype)
        if self.block is not None:
            return part_of_blocks(batch.split(self.block), dtype)
        reference = reference_for(batch, dtype, first)
        if not is_held:
            products, offsets = reference.products(batch)
            return Part(products, None, reference, offsets)
        relative = reference.subtract_from(batch.to(dtype, copy=True))
        return Part(self_product(relative), relative, reference, reference.offsets(relative))

    def join(self, parts: Sequence[Part], layer: str) -> list[LogArray]:
        """Return the matrix of all examples.

        Raises:
            InvalidInputError: If features of a part are not held, or their number differs.
        """
        if self.block is not None:
            blocks = torch.cat([part.values for part in parts])
            gram_blocks = to_log_array(blocks, "gram_blocks", ("pair",), layer)
            return [gram_blocks, *offset_arrays(parts, layer)]
        features = [part.features for part in parts if part.features is not None]
        if len(features) < len(parts) > 1:
            raise InvalidInputError(
                f"the features of its {len(parts)} micro-batches take more memory than `memory` "
                "allows; raise it, or use store=Sketch() or Full()"
            )
        sizes = [len(part.values) for part in parts]
        ends = list(itertools.accumulate(sizes))
        rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        gram = parts[0].values
        if len(parts) > 1:
            _check_widths([of_part.shape[1] for of_part in features])
            gram = gram.new_zeros(ends[-1], ends[-1])
            parts = [relative_to(parts[0], part) for part in parts]
            features = [part.features for part in parts if part.features is not None]
        for i, part in enumerate(parts if len(parts) > 1 else []):
            gram[rows[i], rows[i]] = part.values
            for j, other in enumerate(features[:i]):
                gram[rows[i], rows[j]] = features[i] @ other.T
                gram[rows[j], rows[i]] = gram[rows[i], rows[j]].T
        array = to_log_array(gram, "gram", ("example", "other_example"), layer)
        return [array, *offset_arrays(parts, layer)]

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""
        return {"kind": "gram", "dtype": _dtype_name(self.dtype), "block": self.block}


@dataclass(frozen=True)
class Sketch(Store):
    """Keep a seeded random projection whose inner products are unbiased.

    Each feature goes, with a random sign, to one of `dim` sums (count sketch; Charikar, Chen and
    Farach-Colton, 2002). The inner product of two sketches has the inner product of the features as
    its mean, and a variance of at most (‖x‖²‖y‖² + ⟨x,y⟩²) / dim. For the same number of features
    the projection is the same in every run, on every rank and device. Where features lie far from
    zero, their difference to a reference is projected in float32, and the reference in float64;
    readers return the sum of both, which is the projection of the features.

    Args:
        dim: The number of sums.
        seed: Another seed is another projection.

    Raises:
        InvalidInputError: If `dim` is below 1, or `seed` below 0.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("dim", self.dim, 1)
        check_whole("seed", self.seed, 0)

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator that holds the sketches of the examples so far."""

        def sketches(features: Tensor, first: Part | None) -> Part:
            return self.part(features, is_held=False, first=first)

        rows = sketches(none, None).values.new_empty(num_examples, self.dim)
        return RowsAccumulator(sketches, rows, self.join)

    def kept_bytes(self, num_examples: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes are kept of a layer, whatever the shape of its features."""
        return num_examples * self.dim * (8 if dtype == torch.float64 else 4)

    def part(self, features: Tensor, *, is_held: bool, first: Part | None = None) -> Part:
        """Return the sketches of some examples, of what differs from the reference if there is one.

        Args:
            features: The features.
            is_held: Not used.
            first: The first part that these will be joined with, if there was one.
        """
        batch = as_matrix(features)
        dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
        reference = reference_for(batch, dtype, first)
        return Part(self.project(batch, reference), reference=reference)

    def project(self, features: Tensor, reference: Reference | None = None) -> Tensor:
        """Return the sketches of features, or of what differs from a reference, [batch, dim].

        Args:
            features: The features, [batch, features].
            reference: What is subtracted from them.
        """
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        reference = reference or Reference(None, wide)
        return projected(reference.pieces(features), features.shape[1], self.dim, self.seed)

    def join(self, parts: Sequence[Part], layer: str) -> list[LogArray]:
        """Return the sketches of all examples."""
        first = self._of_reference(parts[0])
        shifted = [
            part
            if part.reference is parts[0].reference
            else Part(part.values + (self._of_reference(part) - first).to(part.values.dtype))
            for part in parts
        ]
        arrays = [to_log_array(_concatenated(shifted), "sketch", ("example", "sketch"), layer)]
        if parts[0].reference is not None and not parts[0].reference.is_zero:
            arrays.append(to_log_array(first, SKETCH_REFERENCE, ("sketch",), layer))
        return arrays

    def _of_reference(self, part: Part) -> Tensor:
        """Return the sketch of what was subtracted, float64 [dim]."""
        if part.reference is None or part.reference.values is None:
            return part.values.new_zeros(self.dim, dtype=torch.float64)
        return self.project(part.reference.values.double()[None])[0]

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""
        return {"kind": "sketch", "dim": self.dim, "seed": self.seed}


@dataclass(frozen=True)
class Full(Store):
    """Keep everything: the examples × features matrix itself.

    Args:
        dtype: The dtype kept; by default the one of the features.
        pool: Take the `mean` or `max` over the positions of a feature map [examples, channels, …]
            first; a matrix [examples, features] stays as it is.
        units: Keep only this many features, drawn at random; of a layer that has no more, all. For
            the same number of features they are the same in every run, on every rank and device.
        seed: Another seed draws others.

    Raises:
        InvalidInputError: If an argument is none of these.
    """

    dtype: torch.dtype | None = None
    pool: Literal["mean", "max"] | None = None
    units: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pool not in (None, "mean", "max"):
            raise InvalidInputError(f"`pool` (={self.pool!r}) must be 'mean', 'max' or None")
        if self.units is not None:
            check_whole("units", self.units, 1)
        check_whole("seed", self.seed, 0)
        check_dtype(self.dtype)
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InvalidInputError(f"`dtype` (={self.dtype}) must be a floating-point type")

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator that holds the features of the examples so far, on the host."""
        rows = self.rows(none)
        shape = (num_examples, rows.shape[1])
        kept = empty_on_host(shape, self.dtype or rows.dtype, none.device)
        return RowsAccumulator(lambda batch, _: Part(self.rows(batch)), kept, self.join)

    def kept_bytes(self, num_examples: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes are kept of a layer."""
        num_features = math.prod(shape if self.pool is None else shape[:1])
        kept = min(num_features, self.units or num_features)
        return num_examples * kept * (self.dtype or dtype).itemsize

    def part(self, features: Tensor, *, is_held: bool, first: Part | None = None) -> Part:
        """Return a copy of the features of some examples."""
        rows = self.rows(features)
        copy = empty_on_host(rows.shape, self.dtype or rows.dtype, rows.device)
        start_copy(copy, rows)
        return Part(copy)

    def rows(self, features: Tensor) -> Tensor:
        """Return what is kept of some examples, which may still be their own memory."""
        kept = features.detach()
        if self.pool is not None and kept.ndim > 2:
            positions = kept.flatten(2)
            kept = positions.mean(2) if self.pool == "mean" else positions.amax(2)
        kept = as_matrix(kept)
        if self.units is not None and self.units < kept.shape[1]:
            kept = kept[:, _drawn(kept.shape[1], self.units, self.seed).to(kept.device)]
        return kept

    def join(self, parts: Sequence[Part], layer: str) -> list[LogArray]:
        """Return the features of all examples.

        Raises:
            InvalidInputError: If their number differs.
        """
        _check_widths([part.values.shape[1] for part in parts])
        features = _concatenated(parts)
        dims = ("example", f"feature_{features.shape[1]}")
        return [to_log_array(features, "full", dims, layer)]

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""
        return {
            "kind": "full",
            "dtype": _dtype_name(self.dtype),
            "pool": self.pool,
            "units": self.units,
            "seed": self.seed,
        }


def _concatenated(parts: Sequence[Part]) -> Tensor:
    wait_for_copies()
    values = [part.values for part in parts]
    return torch.cat(values) if len(values) > 1 else values[0]


def _check_widths(widths: Sequence[int]) -> None:
    if len(set(widths)) > 1:
        raise InvalidInputError(f"its number of features differs between batches: {set(widths)}")


@lru_cache(maxsize=32)
def _drawn(num_features: int, units: int, seed: int) -> Tensor:
    """Return which features are kept, in their order, on the CPU."""
    raw = np.random.PCG64([seed, num_features, units]).random_raw(num_features)
    return torch.from_numpy(np.sort(np.argsort(raw, kind="stable")[:units]))


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
