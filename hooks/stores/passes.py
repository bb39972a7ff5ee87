"""Passes: how often a probe is run so that what must be held of it fits into memory.

A Gram matrix over several batches takes the features of two batches at a time. A pass over the
probe holds the features of some batches of some layers, and multiplies them with those of all later
batches; all passes together hold every batch of every layer once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

# The share of the memory that a pass may hold in any case, as one part in so many.
_LEAST_SHARE = 4

Pass: TypeAlias = dict[str, range]
"""The numbers of the batches that are held, by layer."""


def plan_passes(
    held_bytes: Mapping[str, int],
    batch_sizes: Sequence[int],
    memory: int,
    kept_bytes: Mapping[str, int] | None = None,
) -> list[Pass]:
    """Divide layers and batches into as few passes as a simple rule finds.

    Layers are taken in order; one that does not fit any more is divided between its batches. What
    belongs to the last batch is not held, as none comes after it.

    Args:
        held_bytes: What is held of one example of each layer, in bytes.
        batch_sizes: The number of examples of each batch.
        memory: How many bytes may be taken. A pass may hold a quarter of it however much is kept,
            and a single batch of a layer whatever it takes.
        kept_bytes: What is kept of each layer, in bytes, from the first pass that holds some of it.

    Returns:
        The passes, at least one.
    """
    passes: list[Pass] = [{}]
    num_held = 0
    num_kept = 0
    for layer, num_bytes in held_bytes.items():
        start = 0
        num_kept += (kept_bytes or {}).get(layer, 0)
        free = max(memory - num_kept, memory // _LEAST_SHARE)
        for batch, size in enumerate(batch_sizes[:-1]):
            needed = num_bytes * size
            if num_held and num_held + needed > free:
                if batch > start:
                    passes[-1][layer] = range(start, batch)
                passes.append({})
                start, num_held = batch, 0
            num_held += needed
        passes[-1][layer] = range(start, len(batch_sizes))
    return passes


def pass_bytes(held: Pass, held_bytes: Mapping[str, int], batch_sizes: Sequence[int]) -> int:
    """Return how many bytes a pass holds.

    Args:
        held: The pass.
        held_bytes: What is held of one example of each layer, in bytes.
        batch_sizes: The number of examples of each batch.
    """
    needing = batch_sizes[:-1]
    return sum(
        held_bytes[layer] * sum(needing[batches.start : batches.stop])
        for layer, batches in held.items()
    )
