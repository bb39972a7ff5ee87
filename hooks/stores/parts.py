"""Parts of Gram matrices and sketches: which reference they have, and what makes it one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sonde.log import LogArray

from .accumulators import Part
from .references import Reference, gram_offsets
from .self_products import self_product


def reference_for(features: Tensor, dtype: torch.dtype, first: Part | None) -> Reference:
    """Return what the first part subtracted; without one, what the features ask for."""
    if first is not None and first.reference is not None and first.reference.fits(features):
        return first.reference
    return Reference.of(features, dtype)


def part_of_blocks(blocks: Sequence[Tensor], dtype: torch.dtype) -> Part:
    """Return the matrices of blocks, each with a reference of its own, as none is between them."""
    references = [Reference.of(rows, dtype) for rows in blocks]
    grams, offsets = zip(
        *(reference.products(rows) for reference, rows in zip(references, blocks, strict=True)),
        strict=True,
    )
    values = torch.cat([gram.flatten() for gram in grams])
    used = next((one for one in references if not one.is_zero), references[0])
    return Part(values, None, used, torch.cat(offsets))


def relative_to(first: Part, part: Part) -> Part:
    """Return a part with the reference of the first one, from the features that are held."""
    one, other = part.reference, first.reference
    if one is other:
        return part
    assert one is not None  # A Gram matrix always has one, be it zero.
    assert other is not None
    assert part.features is not None  # All are held where there are several parts.
    shift = torch.zeros_like(part.features[:1])
    for reference, sign in ((one, 1), (other, -1)):
        if reference.values is not None:
            shift += sign * reference.values
    relative = part.features + shift
    return Part(self_product(relative), relative, other, other.offsets(relative))


def offset_arrays(parts: Sequence[Part], layer: str) -> list[LogArray]:
    """Return what a record holds of the offsets of a layer's inner products: none if all are 0."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return gram_offsets([part.reference for part in parts], torch.cat(offsets), layer)
