"""Outputs of layers on a sharded probe: each rank has those of its examples, rank 0 joins them.

Rows of examples, and blocks of a Gram matrix, are only put one behind the other. Of a whole Gram
matrix each rank computes the rows of its own examples, [examples of the rank, examples]; for that
the features of the layer go around once, those of one rank at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonde.hooks.model.ranks import Shards, collect, each_rank_features
from sonde.log import LogArray

from .accumulators import Accumulator, Room
from .host_copies import wait_for_copies
from .log_arrays import to_log_array
from .references import NUM_DECIDING, SKETCH_REFERENCE, Reference, gram_offsets
from .stores import Gram, Store


class OwnPart:
    """A store of the examples of this rank, in as far as a pass over them needs one.

    Args:
        store: The form kept.
        shards: How the examples are divided.
    """

    def __init__(self, store: Store, shards: Shards) -> None:
        self._store = store
        self._shards = shards

    def accumulator(self, num_examples: int, none: Tensor, room: Room | None = None) -> Accumulator:
        """Return an accumulator for one layer, and the examples of this rank.

        Args:
            num_examples: Their number.
            none: The features of no example, [0, …].
            room: Not used, as nothing is held for later batches.
        """
        if isinstance(self._store, Gram) and self._store.block is None:
            return _GramRows(self._store, self._shards, none)
        return self._store.accumulator(num_examples, none)


def join_ranks(accumulator: Accumulator, shards: Shards, layer: str) -> list[LogArray]:
    """Return what all ranks have of a layer, on rank 0; nothing on the others.

    Args:
        accumulator: What this rank has; every rank joins the same layers in the same order.
        shards: How the examples are divided.
        layer: The layer.
    """
    is_needed = shards.num_examples > 0 or isinstance(accumulator, _GramRows)
    own = accumulator.arrays(layer) if is_needed else None
    wait_for_copies()
    parts = collect(own)
    if parts is None:
        return []
    there = zip(parts, shards.sizes, strict=True)
    return _joined([(part, size) for part, size in there if part is not None])


class _GramRows(Accumulator):
    """Takes the features of this rank's examples; its result is a step of all ranks together."""

    def __init__(self, store: Gram, shards: Shards, none: Tensor) -> None:
        self._store = store
        self._shards = shards
        self._held = [store.held(none)]

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        # The model may overwrite them before the other ranks have theirs.
        self._held.append(self._store.held(features))

    def arrays(self, layer: str) -> list[LogArray]:
        own = torch.cat(self._held)
        self._held = []
        reference = _first_of(own, self._shards.sizes)
        own = reference.subtract_from(own)
        columns = [own @ other.T for other in each_rank_features(own, self._shards.sizes)]
        gram = torch.cat(columns, 1)
        return [
            to_log_array(gram, "gram", ("example", "other_example"), layer),
            *gram_offsets([reference], reference.offsets(own), layer),
        ]


def _first_of(own: Tensor, sizes: Sequence[int]) -> Reference:
    """Return what all ranks subtract: what the first examples of the first rank that has some ask.

    Args:
        own: The features of this rank's examples.
        sizes: The number of examples of each rank.
    """
    few = [min(size, NUM_DECIDING) for size in sizes]
    of_ranks = list(each_rank_features(own[:NUM_DECIDING].clone(), few))
    first = next((rows for rows in of_ranks if len(rows)), own)
    return Reference.of(first, own.dtype)


def _joined(parts: Sequence[tuple[list[LogArray], int]]) -> list[LogArray]:
    """Join what ranks have of a layer.

    Args:
        parts: The arrays of each rank that has some, and the number of its examples.
    """
    by_rank = [{array.field: array for array in arrays} for arrays, _ in parts]
    first = {field: array for arrays in reversed(by_rank) for field, array in arrays.items()}
    joined = []
    for field, array in first.items():
        if field == SKETCH_REFERENCE:
            joined.append(array)
            continue
        values = np.concatenate(
            [
                _values_of(arrays, field, size, first.get(SKETCH_REFERENCE))
                for arrays, (_, size) in zip(by_rank, parts, strict=True)
            ]
        )
        if "other_example" in array.dims:
            # Two ranks computed the products of two of their examples, and may round differently.
            values = np.triu(values) + np.triu(values, 1).T
        joined.append(replace(array, values=values, is_owned=True))
    return joined


def _values_of(
    arrays: Mapping[str, LogArray], field: str, size: int, reference: LogArray | None
) -> npt.NDArray[Any]:
    """Return one array of a rank as the other ranks have theirs."""
    if field not in arrays:  # Only offsets may lack: none of its blocks has a reference.
        return np.zeros(size)
    values = arrays[field].values
    if field != "sketch" or reference is None:
        return values
    own = arrays.get(SKETCH_REFERENCE)
    shift = (0 if own is None else own.values) - reference.values
    shifted: npt.NDArray[Any] = (values + shift).astype(values.dtype)
    return shifted
