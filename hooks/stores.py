"""Stores: the form kept of each layer's examples × features matrix.

A store makes an accumulator per layer and pass; it takes the features of one batch at a time and
returns the array to record. What it takes is reduced or copied at once, because the next operation
of the model may change the tensor in place.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sonde.exceptions import InvalidInputError
from sonde.log import LogArray

from .host_copies import empty_on_host, on_host, start_copy, wait_for_copies

# Of a copy in a room, in bytes: a line of the cache.
_ALIGNMENT = 64
_DENSE_DIM = 256
_DENSE_FEATURES = 4096


class Room:
    """One block of memory for the features that a pass holds, used again by the next pass.

    Copies of many sizes, made and freed in turn, would leave gaps that nothing fits into.

    Args:
        num_bytes: Its size; what does not fit gets memory of its own.
        device: Where it is.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._next = 0

    def clear(self) -> None:
        """Give all of it to the copies of another pass; the earlier ones are overwritten."""
        self._next = 0

    def copy(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor, in another type."""
        start = -(-self._next // _ALIGNMENT) * _ALIGNMENT
        end = start + values.numel() * dtype.itemsize
        if end > len(self._bytes):
            return values.to(dtype, copy=True)
        self._next = end
        return self._bytes[start:end].view(dtype).view(values.shape).copy_(values)


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
    def result(self, layer: str) -> LogArray:
        """Return what is recorded of the layer."""


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
    def part(self, features: Tensor, *, is_held: bool) -> Part:
        """Reduce the features of some examples, [batch, …], to what is kept of them.

        Args:
            features: The features.
            is_held: Keep what joining them with other parts takes.
        """

    @abstractmethod
    def join(self, parts: Sequence[Part], layer: str) -> LogArray:
        """Return what is recorded of a layer, from all its parts in the order of the examples.

        Raises:
            InvalidInputError: If they cannot be joined.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""


@dataclass(frozen=True)
class Part:
    """What a store keeps of some examples of a layer.

    Attributes:
        values: What it records of them.
        features: Their features, where other parts need them; [batch, features].
    """

    values: Tensor
    features: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory its features take."""
        return 0 if self.features is None else self.features.nbytes


@dataclass(frozen=True)
class Gram(Store):
    """Keep the examples × examples matrix of inner products, exact.

    It is enough for CKA, principal components over examples and stiffness, and it does not grow
    with the width of the layer. Half-precision features are multiplied in float32.

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
        if self.block is not None and self.block < 4:
            raise InvalidInputError(
                f"`block` (={self.block}) must be >= 4, the examples that centring takes"
            )
        if self.dtype not in (None, torch.float32, torch.float64):
            raise InvalidInputError(
                f"`dtype` (={self.dtype}) of a Gram matrix must be float32 or float64: lower "
                "precision loses what centring leaves"
            )

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator; with one batch it holds no features at all."""
        if self.block is not None:
            return _PartAccumulator(self)
        return _GramAccumulator(self, num_examples, none, room)

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
        """Return a copy of features as they are multiplied, [batch, features]."""
        batch = _as_matrix(features)
        return batch.to(self.dtype_for(batch.dtype), copy=True)

    def part(self, features: Tensor, *, is_held: bool) -> Part:
        """Return the matrix of some examples, and a copy of their features where that is held."""
        batch = _as_matrix(features)
        batch = batch.to(self.dtype_for(batch.dtype), copy=is_held)
        if self.block is not None:
            blocks = batch.split(self.block)
            return Part(torch.cat([_self_product(rows).flatten() for rows in blocks]))
        return Part(_self_product(batch), batch if is_held else None)

    def join(self, parts: Sequence[Part], layer: str) -> LogArray:
        """Return the matrix of all examples.

        Raises:
            InvalidInputError: If features of a part are not held, or their number differs.
        """
        if self.block is not None:
            blocks = torch.cat([part.values for part in parts])
            return to_log_array(blocks, "gram_blocks", ("pair",), layer)
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
            _check_widths([part.shape[1] for part in features])
            gram = gram.new_zeros(ends[-1], ends[-1])
        for i, part in enumerate(parts if len(parts) > 1 else []):
            gram[rows[i], rows[i]] = part.values
            for j, other in enumerate(features[:i]):
                gram[rows[i], rows[j]] = features[i] @ other.T
                gram[rows[j], rows[i]] = gram[rows[i], rows[j]].T
        return to_log_array(gram, "gram", ("example", "other_example"), layer)

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""
        return {"kind": "gram", "dtype": _dtype_name(self.dtype), "block": self.block}


@dataclass(frozen=True)
class Sketch(Store):
    """Keep a seeded random projection whose inner products are unbiased.

    Each feature goes, with a random sign, to one of `dim` sums (count sketch; Charikar, Chen and
    Farach-Colton, 2002). The inner product of two sketches has the inner product of the features as
    its mean, and a variance of at most (‖x‖²‖y‖² + ⟨x,y⟩²) / dim. For the same number of features
    the projection is the same in every run, on every rank and device.

    Args:
        dim: The number of sums.
        seed: Another seed is another projection.

    Raises:
        InvalidInputError: If `dim` is below 1.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise InvalidInputError(f"`dim` (={self.dim}) must be >= 1")

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator that holds the sketches of the examples so far."""

        def sketches(features: Tensor) -> Tensor:
            return self.part(features, is_held=False).values

        return _RowsAccumulator(self, sketches, sketches(none).new_empty(num_examples, self.dim))

    def kept_bytes(self, num_examples: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes are kept of a layer, whatever the shape of its features."""
        return num_examples * self.dim * (8 if dtype == torch.float64 else 4)

    def part(self, features: Tensor, *, is_held: bool) -> Part:
        """Return the sketches of some examples."""
        batch = _as_matrix(features)
        dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
        bucket, sign = _projection(batch.shape[1], self.dim, self.seed)
        bucket, sign = bucket.to(batch.device), sign.to(batch.device, dtype)
        batch = batch.to(dtype)
        if self.dim > _DENSE_DIM:
            sums = torch.zeros(self.dim, len(batch), dtype=dtype, device=batch.device)
            return Part(sums.index_add_(0, bucket, (batch * sign).T).T)
        sums = torch.zeros(len(batch), self.dim, dtype=dtype, device=batch.device)
        for start in range(0, batch.shape[1], _DENSE_FEATURES):
            some = slice(start, start + _DENSE_FEATURES)
            # Nearly all of it is zero; for a small dim a product of matrices is faster yet.
            projection = torch.zeros(len(sign[some]), self.dim, dtype=dtype, device=batch.device)
            projection.scatter_(1, bucket[some, None], sign[some, None])
            sums.addmm_(batch[:, some], projection)
        return Part(sums)

    def join(self, parts: Sequence[Part], layer: str) -> LogArray:
        """Return the sketches of all examples."""
        sketches = _one_behind_the_other(parts)
        return to_log_array(sketches, "sketch", ("example", "sketch"), layer)

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
        if self.units is not None and self.units < 1:
            raise InvalidInputError(f"`units` (={self.units}) must be >= 1")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise InvalidInputError(f"`dtype` (={self.dtype}) must be a floating-point type")

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator that holds the features of the examples so far, on the host."""
        rows = self.rows(none)
        shape = (num_examples, rows.shape[1])
        return _RowsAccumulator(
            self, self.rows, empty_on_host(shape, self.dtype or rows.dtype, none.device)
        )

    def kept_bytes(self, num_examples: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return how many bytes are kept of a layer."""
        num_features = math.prod(shape if self.pool is None else shape[:1])
        kept = min(num_features, self.units or num_features)
        return num_examples * kept * (self.dtype or dtype).itemsize

    def part(self, features: Tensor, *, is_held: bool) -> Part:
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
        kept = _as_matrix(kept)
        if self.units is not None and self.units < kept.shape[1]:
            kept = kept[:, _drawn(kept.shape[1], self.units, self.seed).to(kept.device)]
        return kept

    def join(self, parts: Sequence[Part], layer: str) -> LogArray:
        """Return the features of all examples.

        Raises:
            InvalidInputError: If their number differs.
        """
        _check_widths([part.values.shape[1] for part in parts])
        features = _one_behind_the_other(parts)
        return to_log_array(features, "full", ("example", f"feature_{features.shape[1]}"), layer)

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the store."""
        return {
            "kind": "full",
            "dtype": _dtype_name(self.dtype),
            "pool": self.pool,
            "units": self.units,
            "seed": self.seed,
        }


def to_log_array(
    values: Tensor, field: str, dims: tuple[str, ...], layer: str | None = None
) -> LogArray:
    """Bring a tensor that nobody changes any more to the CPU, as an array of the log.

    bfloat16 keeps its bits. From an accelerator the values are there after `wait_for_copies`.
    """
    values = on_host(values.detach())
    if values.dtype == torch.bfloat16:
        bits = values.contiguous().view(torch.int16).numpy().view(np.uint16)
        return LogArray(field, bits, dims, layer, dtype="bfloat16", is_owned=True)
    return LogArray(field, values.numpy(), dims, layer, is_owned=True)


class _GramAccumulator(Accumulator):
    def __init__(self, store: Gram, num_examples: int, none: Tensor, room: Room | None) -> None:
        self._store = store
        self._num_examples = num_examples
        self._room = room or Room(0, none.device)
        size = (num_examples, num_examples)
        self._gram = torch.zeros(size, dtype=store.dtype_for(none.dtype), device=none.device)
        self._held: list[tuple[slice, Tensor]] = []
        self._next = 0

    def start(self, first: int) -> None:
        self._held = []
        self._next = first

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        batch = _as_matrix(features)
        rows = slice(self._next, self._next + len(batch))
        self._next = rows.stop
        # Later batches need these features again, and the model may overwrite them.
        is_needed = is_held and rows.stop < self._num_examples
        dtype = self._store.dtype_for(batch.dtype)
        batch = self._room.copy(batch, dtype) if is_needed else batch.to(dtype)
        for columns, other in self._held:
            torch.mm(batch, other.T, out=self._gram[rows, columns])
            self._gram[columns, rows] = self._gram[rows, columns].T
        if is_held:
            self._gram[rows, rows] = _self_product(batch)
        if is_needed:
            self._held.append((rows, batch))
        if rows.stop == self._num_examples:
            self._held = []

    def result(self, layer: str) -> LogArray:
        return to_log_array(self._gram, "gram", ("example", "other_example"), layer)


class _PartAccumulator(Accumulator):
    """Takes parts that only have to be put one behind the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: list[Part] = []

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        self._parts.append(self._store.part(features, is_held=False))

    def result(self, layer: str) -> LogArray:
        return self._store.join(self._parts, layer)


class _RowsAccumulator(Accumulator):
    """Takes rows of examples into one tensor, which is there before the model runs.

    Many small ones, made in between, would keep the memory of large ones from being given back.
    """

    def __init__(self, store: Store, reduce: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        self._store = store
        self._reduce = reduce
        self._rows = rows
        self._next = 0

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        values = self._reduce(features)
        start_copy(self._rows[self._next : self._next + len(values)], values)
        self._next += len(values)

    def result(self, layer: str) -> LogArray:
        return self._store.join([Part(self._rows)], layer)


def _as_matrix(features: Tensor) -> Tensor:
    values = features.detach()
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def _self_product(batch: Tensor) -> Tensor:
    """Return the matrix of inner products of rows."""
    if batch.device.type != "cpu":
        return batch @ batch.T
    # NumPy sees that the result is symmetric, and computes half of it.
    values = batch.numpy()
    return torch.from_numpy(values @ values.T)


def _one_behind_the_other(parts: Sequence[Part]) -> Tensor:
    wait_for_copies()
    values = [part.values for part in parts]
    return torch.cat(values) if len(values) > 1 else values[0]


def _check_widths(widths: Sequence[int]) -> None:
    if len(set(widths)) > 1:
        raise InvalidInputError(f"its number of features differs between batches: {set(widths)}")


@lru_cache(maxsize=32)
def _projection(num_features: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sum each feature goes to, and its sign, on the CPU."""
    # Raw bits of a specified generator: they outlive versions of torch and NumPy.
    raw = np.random.PCG64([seed, num_features, dim]).random_raw(num_features)
    bucket = torch.from_numpy(((raw >> np.uint64(32)) % np.uint64(dim)).astype(np.int64))
    sign = torch.from_numpy((raw & np.uint64(1)).astype(np.int64) * 2 - 1)
    return bucket, sign


@lru_cache(maxsize=32)
def _drawn(num_features: int, units: int, seed: int) -> Tensor:
    """Return which features are kept, in their order, on the CPU."""
    raw = np.random.PCG64([seed, num_features, units]).random_raw(num_features)
    return torch.from_numpy(np.sort(np.argsort(raw, kind="stable")[:units]))


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
