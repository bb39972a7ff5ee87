"""Outputs of layers on a sharded probe: each rank has those of its examples, rank 0 joins them.

Rows of examples, and blocks of a Gram matrix, are only put one behind the other. Of a whole Gram
matrix each rank computes the rows of its own examples, [examples of the rank, examples]; for that
the features of the layer go around once, those of one rank at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sonde.log import LogArray

from .accumulators import Accumulator, Room
from .host_copies import wait_for_copies
from .log_arrays import to_log_array
from .sharding import Shards, collect, each_rank_features
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


def join_ranks(accumulator: Accumulator, shards: Shards, layer: str) -> LogArray | None:
    """Return what all ranks have of a layer, on rank 0; None on the others.

    Args:
        accumulator: What this rank has; every rank joins the same layers in the same order.
        shards: How the examples are divided.
        layer: The layer.
    """
    is_needed = shards.num_examples > 0 or isinstance(accumulator, _GramRows)
    own = accumulator.result(layer) if is_needed else None
    wait_for_copies()
    parts = collect(own)
    if parts is None:
        return None
    return _joined([part for part in parts if part is not None])


class _GramRows(Accumulator):
    """Takes the features of this rank's examples; its result is a step of all ranks together."""

    def __init__(self, store: Gram, shards: Shards, none: Tensor) -> None:
        self._store = store
        self._shards = shards
        self._held = [store.held(none)]

    def add(self, features: Tensor, *, is_held: bool = True) -> None:
        # The model may overwrite them before the other ranks have theirs.
        self._held.append(self._store.held(features))

    def result(self, layer: str) -> LogArray:
        own = torch.cat(self._held)
        self._held = []
        columns = [own @ other.T for other in each_rank_features(own, self._shards.sizes)]
        return to_log_array(torch.cat(columns, 1), "gram", ("example", "other_example"), layer)


def _joined(parts: Sequence[LogArray]) -> LogArray:
    values = np.concatenate([part.values for part in parts])
    if "other_example" in parts[0].dims:
        # Two ranks computed the products of two of their examples, and may round them differently.
        values = np.triu(values) + np.triu(values, 1).T
    return replace(parts[0], values=values, is_owned=True)
